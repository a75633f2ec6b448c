"""How DashScope's native API streams an answer, on its two paths, in increments or in snapshots."""

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from deltafan.testing._answer import Answer, Audio, Fault, Part, Reasoning, Refusal, Text, Tokens, ToolCall
from deltafan.testing._steps import Named, Step

Route: TypeAlias = Literal["text", "multimodal"]


@dataclass(frozen=True)
class Delta:
    """What one frame brings."""

    content: str = ""
    reasoning: str = ""
    call: Mapping[str, Any] | None = None
    sound: str = ""


def result(output: Mapping[str, Any], usage: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A frame's data: output, the usage so far, the request's id."""
    return {"output": output, "usage": usage or {}, "request_id": "sim-1"}


def error_event(fault: Fault) -> Named:
    """The error event inside a 200."""
    data = {"code": fault.code, "message": fault.message, "request_id": "sim-1"}
    return Named("error", data, fault.status)


def usage_object(tokens: Tokens, frame: int = 1, frames: int = 1) -> dict[str, Any]:
    """The usage as this API counts it, at this frame of so many; it grows until the last."""
    output = tokens.output * frame // frames
    counts: dict[str, Any] = {"input_tokens": tokens.input, "output_tokens": output}
    counts["total_tokens"] = tokens.input + output
    if tokens.reasoning:
        counts["output_tokens_details"] = {"reasoning_tokens": min(tokens.reasoning, output)}
    cached: dict[str, Any] = {"cached_tokens": tokens.cached_input}
    if tokens.cache_write:
        cached |= {"cache_creation_input_tokens": tokens.cache_write, "cache_type": "ephemeral"}
    return {**counts, "prompt_tokens_details": cached}


def streamed(answer: Answer, *, route: Route, incremental: bool, as_message: bool) -> Iterator[Step]:
    """The frames of this answer, and what happens between them."""
    plan = [*_plan(answer)]
    deltas = [step for step in plan if isinstance(step, Delta)]
    # Only a text, and only on the text path, is followed by a frame for the finish alone; and sound by its address.
    finish_alone = not deltas or bool(deltas[-1].sound) or (route == "text" and deltas[-1].call is None)
    frames = len(deltas) + finish_alone
    output = Output(answer, route=route, incremental=incremental, as_message=as_message)
    number = 0
    for step in plan:
        if isinstance(step, Fault):
            yield error_event(step)
            return
        if isinstance(step, Delta):
            number += 1
            finish = answer.finish if number == frames else "null"
            yield result(output.of(step, finish), _usage_at(answer, number, frames))
        else:
            yield step
    if finish_alone:
        yield result(output.of(None, answer.finish), _usage_at(answer, frames, frames))


def whole(answer: Answer, *, route: Route, as_message: bool) -> dict[str, Any]:
    """The answer to a request that asked for no stream."""
    output = Output(answer, route=route, incremental=False, as_message=as_message)
    said = output.of(None, answer.finish)
    for delta in _plan(answer):
        if isinstance(delta, Delta):
            said = output.of(delta, answer.finish)
    return result(said, _usage_at(answer, 1, 1))


def _usage_at(answer: Answer, frame: int, frames: int) -> dict[str, Any]:
    return usage_object(answer.usage, frame, frames) if answer.usage else {}


def _plan(answer: Answer) -> Iterator[Step | Delta | Fault]:
    index = 0
    for part in answer.parts:
        match part:
            case Reasoning(text):
                yield Delta(reasoning=text)
            case Text(text) | Refusal(text):
                yield Delta(content=text)
            case ToolCall():
                yield from _call(part, index)
                index += 1
            case Audio(pcm, transcript):
                if transcript:
                    yield Delta(content=transcript)
                if pcm:
                    yield Delta(sound=base64.b64encode(pcm).decode())
            case _:
                assert isinstance(part, Fault) or not isinstance(part, Part)
                yield part


def _call(call: ToolCall, index: int) -> Iterator[Delta]:
    entry = {"index": index, "type": "function"}
    yield Delta(call={**entry, "id": call.id, "function": {"name": call.name, "arguments": ""}})
    for fragment in call.arguments:
        yield Delta(call={**entry, "id": "", "function": {"arguments": fragment}})


class Output:
    """The `output` object of one frame after the other."""

    def __init__(self, answer: Answer, *, route: Route, incremental: bool, as_message: bool) -> None:
        self._route = route
        self._incremental = incremental
        self._thinks = bool(answer.reasoning)
        # A bare text can hold neither thoughts nor calls.
        self._as_text = route == "text" and not as_message and not self._thinks and not answer.tool_calls
        self._content = ""
        self._reasoning = ""
        self._calls: list[dict[str, Any]] = []
        self._sounded = False

    def of(self, delta: Delta | None, finish: str) -> dict[str, Any]:
        """The next frame's. None brings nothing but the finish."""
        sound = delta.sound if delta is not None else ""
        if sound or (delta is None and self._sounded):
            self._sounded = True
            url = "" if sound else "http://sim/audio_1.wav"
            return {"audio": {"data": sound, "expires_at": 1, "id": "audio_1", "url": url}, "finish_reason": finish}
        shown, calls = self._shown(delta or Delta())
        if self._as_text:
            return {"finish_reason": finish, "text": shown.content}
        message: dict[str, Any] = {"content": self._content_object(shown.content), "role": "assistant"}
        if self._thinks and (self._route == "text" or shown.reasoning):
            message["reasoning_content"] = shown.reasoning
        choice: dict[str, Any] = {"message": message, "finish_reason": finish}
        if calls:
            message["tool_calls"] = calls
            if self._route == "text":
                choice["index"] = 0
        return {"choices": [choice]}

    def _shown(self, delta: Delta) -> tuple[Delta, list[Any]]:
        """The delta itself, or all so far."""
        if self._incremental:
            return delta, [delta.call] if delta.call is not None else []
        self._content += delta.content
        self._reasoning += delta.reasoning
        if delta.call is not None:
            self._add(delta.call)
        return Delta(self._content, self._reasoning), [
            {**call, "function": {**call["function"]}} for call in self._calls
        ]

    def _add(self, call: Mapping[str, Any]) -> None:
        if call["id"]:
            # A snapshot's calls have no index.
            self._calls.append({"id": call["id"], "type": "function", "function": {**call["function"]}})
        else:
            self._calls[-1]["function"]["arguments"] += call["function"]["arguments"]

    def _content_object(self, content: str) -> Any:
        if self._route == "text":
            return content
        return [{"text": content}] if content else []
