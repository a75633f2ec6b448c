"""How Chat Completions streams an answer, in OpenAI's dialect and in DashScope's."""

import base64
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from deltafan.testing._answer import Answer, Audio, Fault, Part, Reasoning, Refusal, Text, Tokens, ToolCall
from deltafan.testing._steps import Dialect, Frame, Step

HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "sim"}


def chunk(choice: Mapping[str, Any] | None, **fields: Any) -> dict[str, Any]:
    """A chunk with this one choice, or with none; `fields` are the chunk's own."""
    choices = [] if choice is None else [{"index": 0, "finish_reason": None, "logprobs": None, **choice}]
    return {**HEAD, "choices": choices, "usage": None, **fields}


def usage_object(tokens: Tokens, dialect: Dialect = "openai") -> dict[str, Any]:
    """The usage as this API counts it."""
    details: dict[str, Any] = {"cached_tokens": tokens.cached_input}
    if tokens.cache_write and dialect == "openai":
        details["cache_write_tokens"] = tokens.cache_write
    elif tokens.cache_write:
        details |= {"cache_creation_input_tokens": tokens.cache_write, "cache_type": "ephemeral"}
    counts = {"prompt_tokens": tokens.input, "completion_tokens": tokens.output, "total_tokens": tokens.total}
    # DashScope's details are there when there is something to tell, OpenAI's always.
    if dialect == "dashscope" and not tokens.reasoning:
        return {**counts, "prompt_tokens_details": details}
    reasoning = {"reasoning_tokens": tokens.reasoning}
    return {**counts, "prompt_tokens_details": details, "completion_tokens_details": reasoning}


def error_body(fault: Fault) -> dict[str, Any]:
    """The error object, in an HTTP error's body or in a stream."""
    return {"error": {"message": fault.message, "type": fault.code, "param": None, "code": fault.code}}


def error_finish(fault: Fault) -> Frame:
    """DashScope's error in the middle of an answer: a chunk that carries the native API's frame as its content."""
    native = orjson.dumps({"request_id": "sim-1", "code": fault.code, "message": fault.message}).decode()
    content = f"id:1\nevent:error\n:HTTP_STATUS/{fault.status}\ndata:{native}"
    return chunk({"delta": {"content": content}, "finish_reason": "error_finish"})


def streamed(answer: Answer, *, dialect: Dialect, include_usage: bool) -> Iterator[Step]:
    """The chunks of this answer, and what happens between them."""
    rendering = _OpenAI(answer) if dialect == "openai" else _DashScope(answer)
    yield from rendering.opening()
    for part in answer.parts:
        if isinstance(part, Fault):
            yield error_finish(part) if dialect == "dashscope" else error_body(part)
            return
        if isinstance(part, Part):
            yield from rendering.part(part)
        else:
            yield part
    yield from rendering.finish()
    if include_usage and answer.usage is not None:
        yield chunk(None, usage=usage_object(answer.usage, dialect))


class _OpenAI:
    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._parts = [part for part in answer.parts if isinstance(part, Part)]
        # With a single call the role comes in its opener.
        self._role_in_opener = len(self._parts) == 1 and isinstance(self._parts[0], ToolCall)
        self._calls = 0

    def opening(self) -> Iterator[Step]:
        """The role."""
        if self._role_in_opener:
            return
        match self._parts[:1]:
            case [Refusal()]:
                yield _delta(role="assistant", content=None, refusal="")
            case [ToolCall() | Reasoning()]:
                yield _delta(role="assistant", content=None)
            case _:
                yield _delta(role="assistant", content="", refusal=None)

    def part(self, part: Part) -> Iterator[Step]:
        match part:
            case Reasoning(text):
                # OpenAI shows none here; those who speak its dialect and do use this field.
                yield _delta(reasoning_content=text)
            case Refusal(text):
                yield _delta(refusal=text)
            case Text(text):
                yield _delta(content=text)
            case ToolCall():
                yield from self._call(part)
            case Audio(pcm, transcript):
                if transcript:
                    yield _delta(audio={"id": "audio_1", "transcript": transcript})
                if pcm:
                    yield _delta(audio={"id": "audio_1", "data": base64.b64encode(pcm).decode()})

    def _call(self, call: ToolCall) -> Iterator[Step]:
        index, self._calls = self._calls, self._calls + 1
        opener = {"index": index, "id": call.id, "type": "function", "function": {"name": call.name, "arguments": ""}}
        role = {"role": "assistant", "content": None, "refusal": None} if self._role_in_opener else {}
        yield _delta(**role, tool_calls=[opener])
        for fragment in call.arguments:
            yield _delta(tool_calls=[{"index": index, "function": {"arguments": fragment}}])

    def finish(self) -> Iterator[Step]:
        yield chunk({"delta": {}, "finish_reason": self._answer.finish})
        if any(isinstance(part, Audio) for part in self._parts):
            # The last word about the audio comes after the finish, in a choice that has no finish_reason.
            yield {**chunk(None), "choices": [{"index": 0, "delta": {"audio": {"expires_at": 1}}}]}


class _DashScope:
    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._parts = [part for part in answer.parts if isinstance(part, Part)]
        thinks = any(isinstance(part, Reasoning) for part in self._parts)
        self._not_thinking = {"reasoning_content": None} if thinks else {}
        self._calls = len(answer.tool_calls)
        self._call_number = 0

    def opening(self) -> Iterator[Step]:
        """The role, which a call brings itself."""
        match self._parts[:1]:
            case [ToolCall()]:
                return
            case [Reasoning()]:
                yield _delta(content=None, role="assistant", reasoning_content="")
            case _:
                yield _delta(content="", role="assistant")

    def part(self, part: Part) -> Iterator[Step]:
        match part:
            case Reasoning(text):
                yield _delta(content=None, reasoning_content=text)
            case Refusal(text):
                yield _delta(refusal=text)
            case Text(text):
                yield _delta(content=text, **self._not_thinking)
            case ToolCall():
                yield from self._call(part)
            case Audio(pcm, transcript):
                if transcript:
                    yield _delta(content=transcript)
                if pcm:
                    data = base64.b64encode(pcm).decode()
                    yield _delta(audio={"data": data, "expires_at": 1, "id": "audio_1"})

    def _call(self, call: ToolCall) -> Iterator[Step]:
        index, self._call_number = self._call_number, self._call_number + 1
        entry = {"index": index, "type": "function"}
        opener = {**entry, "id": call.id, "function": {"name": call.name, "arguments": ""}}
        role = {"role": "assistant"} if self._parts[0] is call else {}
        yield _delta(content=None, **self._not_thinking, tool_calls=[opener], **role)
        for fragment in call.arguments:
            more = {**entry, "id": "", "function": {"arguments": fragment}}
            yield _delta(content=None, **self._not_thinking, tool_calls=[more])
        if self._call_number == self._calls:
            # One more fragment, empty, in a choice without finish_reason and logprobs.
            empty = {**entry, "id": "", "function": {"arguments": ""}}
            yield {**chunk(None), "choices": [{"index": 0, "delta": {"tool_calls": [empty]}}]}

    def finish(self) -> Iterator[Step]:
        delta = {} if self._calls and not self._not_thinking else {"content": "", **self._not_thinking}
        yield chunk({"delta": delta, "finish_reason": self._answer.finish})


def _delta(**fields: Any) -> Frame:
    return chunk({"delta": fields})


def whole(answer: Answer, dialect: Dialect) -> dict[str, Any]:
    """The answer to a request that asked for no stream."""
    message: dict[str, Any] = {"role": "assistant", "content": answer.text}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.refusal:
        message["refusal"] = answer.refusal
    if answer.tool_calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": "".join(call.arguments)}}
            for call in answer.tool_calls
        ]
    choice = {"index": 0, "message": message, "finish_reason": answer.finish, "logprobs": None}
    usage = usage_object(answer.usage, dialect) if answer.usage else None
    return {**HEAD, "object": "chat.completion", "choices": [choice], "usage": usage}
