"""Chat Completions as it is streamed: its frames, and whole answers made of them."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import orjson

from deltafan.testing._answer import Answer, Fault
from deltafan.testing._chat_answer import chunk, error_body, streamed, usage_object, whole
from deltafan.testing._chat_answer import error_finish as _error_finish
from deltafan.testing._steps import Cut, Dialect, Frame, Gap, Named, Raw, Refuse, Step

__all__ = [
    "COMMENT",
    "DONE",
    "USAGE",
    "Cut",
    "Frame",
    "Gap",
    "Named",
    "Raw",
    "Refuse",
    "Step",
    "at_once",
    "byte_by_byte",
    "chunk",
    "delta",
    "ending",
    "error",
    "error_finish",
    "frame",
    "opening",
    "paced",
    "refusal",
    "render",
    "text",
    "usage_object",
    "whole",
]

USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12, "prompt_tokens_details": {"cached_tokens": 2}}
DONE = Raw(b"data: [DONE]\n\n")
COMMENT = Raw(b": keep-alive\n\n")


def render(
    answer: Answer,
    *,
    dialect: Dialect = "openai",
    include_usage: bool = True,
    include_obfuscation: bool = True,
    model: str = "sim",
) -> list[Step]:
    """The steps of this answer, [DONE] included; only OpenAI's dialect obfuscates."""
    extra = {"model": model}
    if dialect == "openai" and include_obfuscation:
        extra["obfuscation"] = "sim"
    steps = streamed(answer, dialect=dialect, include_usage=include_usage)
    named: list[Step] = [{**step, **extra} if isinstance(step, dict) and "choices" in step else step for step in steps]
    # Where the answer breaks, nothing ends it.
    return named if answer.fault else [*named, DONE]


def text(*pieces: str, finish: str = "stop", usage: Mapping[str, Any] | None = USAGE) -> list[Frame]:
    """An ordinary answer: one content delta a piece, finish, usage, [DONE]."""
    return [opening(), *(delta(content=piece) for piece in pieces), *ending(finish, usage)]


def paced(deltas: int, gap_s: float) -> list[Step]:
    """An answer of so many deltas, each after a gap."""
    steps = (step for number in range(deltas) for step in (Gap(gap_s), delta(content=f"{number} ")))
    return [opening(), *steps, *ending()]


def opening() -> Frame:
    """The first chunk: a role and no text yet."""
    return chunk({"delta": {"role": "assistant", "content": ""}})


def delta(**fields: Any) -> Frame:
    """A chunk with these fields in its delta."""
    return chunk({"delta": fields})


def ending(finish: str = "stop", usage: Mapping[str, Any] | None = USAGE) -> list[Frame]:
    """The finish, the usage if there is one, and [DONE]."""
    steps: list[Frame] = [chunk({"delta": {}, "finish_reason": finish})]
    if usage is not None:
        steps.append(chunk(None, usage=dict(usage)))
    return [*steps, DONE]


def error(code: str, message: str) -> Frame:
    """The error object in the middle of a 200, as OpenAI and many others send it."""
    return error_body(Fault(code, message))


def error_finish(code: str, message: str, status: int = 429) -> Frame:
    """DashScope's error in the middle of a 200: a chunk whose content is the native API's error frame."""
    return _error_finish(Fault(code, message, status))


def refusal(code: str, message: str, status: int) -> Refuse:
    """An HTTP error with this API's body."""
    body = orjson.dumps(error_body(Fault(code, message)))
    return Refuse(status, body, {"Content-Type": "application/json"})


def frame(step: Frame) -> bytes:
    """What this step writes."""
    if isinstance(step, Raw):
        return step.data
    if isinstance(step, Named):
        return b"event: %b\ndata: %b\n\n" % (step.event.encode(), orjson.dumps(dict(step.data)))
    return b"data: " + orjson.dumps(dict(step)) + b"\n\n"


def at_once(steps: Iterable[Frame]) -> Raw:
    """These frames in one write."""
    return Raw(b"".join(map(frame, steps)))


def byte_by_byte(steps: Iterable[Frame]) -> Iterator[Step]:
    """These frames in writes of one byte, each on its way before the next."""
    for byte in at_once(steps).data:
        yield Raw(bytes([byte]))
        yield Gap(0)
