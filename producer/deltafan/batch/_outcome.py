"""What became of a row, and the line that says so, in OpenAI's batch output format."""

import time
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from deltafan import Generation
from deltafan.batch._ids import tries_up_to
from deltafan.batch._rows import Row

Bill = dict[str, float]
"""Tokens by their kind, and amounts by their currency."""
TOKENS = ("input_tokens", "output_tokens")
LINE_HEAD = b'{"id":"batch_req_'
"""What each line begins with."""
_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """A row that has ended."""

    row: Row
    job_id: str
    generation: Generation = field(repr=False)
    seconds: float
    """From its submit to its end."""

    @property
    def is_answer(self) -> bool:
        """Whether there is a whole answer."""
        return self.generation.status == "completed"

    @property
    def tries(self) -> int:
        """How many tries the row has had, withdrawn ones too, which is the number of its next: `Batch(tries=…)`."""
        return tries_up_to(self.job_id)

    @property
    def error_code(self) -> str | None:
        """Why there is none."""
        if self.is_answer:
            return None
        return self.generation.failure.code if self.generation.failure else self.generation.status

    def bill(self, earlier: Bill) -> Bill:
        """What the row has used and cost, with its tries before this one."""
        usage = self.generation.usage
        data = {} if usage is None else {"usage": usage.to_json(), "cost": usage.cost, "currency": usage.currency}
        return bill_of({**data, "earlier": earlier})

    def line(self, earlier: Bill | None = None) -> bytes:
        """One line of the output, or of the error file; usage and cost stand beside what OpenAI writes.

        `earlier` is the bill of the row's tries before this one, whose own lines do not stay for ever.
        """
        generation, usage = self.generation, self.generation.usage
        data: dict[str, Any] = {"id": f"batch_req_{self.job_id}", "custom_id": self.row.custom_id}
        if self.is_answer:
            body = _response(self) if self.row.api == "responses" else _chat_completion(self)
            data |= {"response": {"status_code": 200, "request_id": self.job_id, "body": body}, "error": None}
        else:
            failure = generation.failure
            message = failure.message if failure else f"cancelled ({generation.cancel_reason})"
            data |= {"response": None, "error": {"code": self.error_code, "message": message}}
        if usage is not None:
            data |= {"usage": usage.to_json(), "cost": usage.cost, "currency": usage.currency}
        if earlier:
            data["earlier"] = earlier
        return orjson.dumps(data) + b"\n"


def bill_of(line: Mapping[str, Any]) -> Bill:
    """What a row has used and cost up to this line of its."""
    bill = Bill(line.get("earlier") or {})
    counts = {name: (line.get("usage") or {}).get(name) for name in TOKENS}
    for name, amount in (*counts.items(), (line.get("currency"), line.get("cost"))):
        if name and amount:
            bill[name] = bill.get(name, 0) + amount
    return bill


def _chat_completion(outcome: Outcome) -> dict[str, Any]:
    generation, usage = outcome.generation, outcome.generation.usage
    message: dict[str, Any] = {
        "role": "assistant",
        "content": generation.content,
        "refusal": generation.refusal or None,
    }
    if generation.reasoning:
        message["reasoning_content"] = generation.reasoning
    if generation.tool_calls:
        message["tool_calls"] = generation.to_messages()[0]["tool_calls"]
    if generation.annotations:
        message["annotations"] = list(generation.annotations)
    if (speech := generation.audio) is not None:
        data = {"data": b64encode(speech).decode(), "transcript": generation.transcript}
        message["audio"] = {"id": f"audio-{outcome.job_id}", "expires_at": 0, **data}
    counts = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    if usage is not None:
        given = (usage.input_tokens, usage.output_tokens, usage.total_tokens)
        counts = dict(zip(counts, (count or 0 for count in given), strict=True))
    return {
        "id": (usage and usage.response_id) or f"chatcmpl-{outcome.job_id}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": generation.model or outcome.row.model,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": generation.finish_reason}],
        "usage": counts,
    }


def _response(outcome: Outcome) -> dict[str, Any]:
    generation, usage = outcome.generation, outcome.generation.usage
    counts = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
    if usage is not None:
        counts = {name: getattr(usage, name) or 0 for name in counts}
    cached, written = (usage and usage.cached_input_tokens) or 0, (usage and usage.cache_write_tokens) or 0
    details = {
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": written},
        "output_tokens_details": {"reasoning_tokens": (usage and usage.reasoning_tokens) or 0},
    }
    reason = _INCOMPLETE.get(generation.finish_reason or "")
    return {
        "id": (usage and usage.response_id) or f"resp_{outcome.job_id}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "incomplete" if reason else "completed",
        "incomplete_details": {"reason": reason} if reason else None,
        "model": generation.model or outcome.row.model,
        "output": _output_items(generation),
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": counts | details,
    }


def _output_items(generation: Generation) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    if generation.reasoning:
        summary = [{"type": "summary_text", "text": generation.reasoning}]
        items.append({"id": "rs_0", "type": "reasoning", "summary": summary})
    content: list[dict[str, Any]] = []
    if generation.content:
        sources = list(generation.annotations)
        content.append({"type": "output_text", "text": generation.content, "annotations": sources})
    if generation.refusal:
        content.append({"type": "refusal", "refusal": generation.refusal})
    if (speech := generation.audio) is not None:
        data = b64encode(speech).decode()
        content.append({"type": "output_audio", "data": data, "transcript": generation.transcript})
    if content:
        message = {"type": "message", "role": "assistant", "status": "completed", "content": content}
        items.append({"id": "msg_0", **message})
    for index, call in enumerate(generation.tool_calls):
        arguments = {"name": call.name, "arguments": call.arguments, "call_id": call.id}
        items.append({"id": f"fc_{index}", "type": "function_call", "status": "completed", **arguments})
    return items
