"""Chat Completions as it is streamed: its frames, and whole answers made of them."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import orjson

from deltafan.testing._steps import Cut, Frame, Gap, Raw, Refuse, Step

__all__ = [
    "COMMENT",
    "DONE",
    "USAGE",
    "Cut",
    "Frame",
    "Gap",
    "Raw",
    "Refuse",
    "Step",
    "at_once",
    "byte_by_byte",
    "chunk",
    "delta",
    "ending",
    "frame",
    "opening",
    "paced",
    "text",
]

USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12, "prompt_tokens_details": {"cached_tokens": 2}}
DONE = Raw(b"data: [DONE]\n\n")
COMMENT = Raw(b": keep-alive\n\n")


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


def chunk(choice: Mapping[str, Any] | None, **fields: Any) -> dict[str, Any]:
    """A chunk with this one choice, or with none; `fields` are the chunk's own."""
    choices = [] if choice is None else [{"index": 0, "finish_reason": None, "logprobs": None, **choice}]
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "sim"}
    return {**head, "choices": choices, "usage": None, **fields}


def frame(step: Frame) -> bytes:
    """What this step writes."""
    return step.data if isinstance(step, Raw) else b"data: " + orjson.dumps(dict(step)) + b"\n\n"


def at_once(steps: Iterable[Frame]) -> Raw:
    """These frames in one write."""
    return Raw(b"".join(map(frame, steps)))


def byte_by_byte(steps: Iterable[Frame]) -> Iterator[Step]:
    """These frames in writes of one byte, each on its way before the next."""
    for byte in at_once(steps).data:
        yield Raw(bytes([byte]))
        yield Gap(0)
