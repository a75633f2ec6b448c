"""DashScope's native API as it is streamed: its frames, and whole answers made of them."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import orjson

from deltafan.testing._answer import DEFAULT_USAGE, Answer, Fault, Text
from deltafan.testing._dashscope_answer import Route, error_event, result, streamed, usage_object, whole
from deltafan.testing._steps import Cut, Frame, Gap, Named, Raw, Refuse, Step

__all__ = [
    "COMMENT",
    "USAGE",
    "WRONG_PATH",
    "Cut",
    "Frame",
    "Framing",
    "Gap",
    "Named",
    "Raw",
    "Refuse",
    "Route",
    "Step",
    "at_once",
    "byte_by_byte",
    "delta",
    "error",
    "frame",
    "lives_on",
    "refusal",
    "render",
    "result",
    "text",
    "usage_object",
    "whole",
]

USAGE = usage_object(DEFAULT_USAGE)
COMMENT = Raw(b":keep-alive\n\n")
WRONG_PATH = "url error, please check url!"

_MULTIMODAL = re.compile(r"(^|-)(vl|omni|qvq|ocr|tts|asr|multimodal)\b|^qwen3\.6-plus|^qwen3\.8-max")
_TEXT = re.compile(r"^(qwen|qwq)|(^|-)text\b")


def lives_on(model: str) -> Route | None:
    """The one path on which this model answers, as far as its name says; None answers on both."""
    if _MULTIMODAL.search(model):
        return "multimodal"
    return "text" if _TEXT.search(model) else None


def render(answer: Answer, *, route: Route = "text", incremental: bool = True, as_message: bool = True) -> list[Step]:
    """The steps of this answer. Without `as_message` it is a bare text, where it is nothing but text."""
    return [*streamed(answer, route=route, incremental=incremental, as_message=as_message)]


def text(*pieces: str, route: Route = "text", incremental: bool = True, finish: str = "stop") -> list[Step]:
    """An ordinary answer: one frame a piece."""
    return render(Answer([Text(piece) for piece in pieces], finish), route=route, incremental=incremental)


def delta(
    content: str | list[Any] = "", *, finish: str = "null", usage: Mapping[str, Any] | None = USAGE, **fields: Any
) -> Frame:
    """A frame whose one choice has this message; `fields` are more of it, such as reasoning_content or tool_calls."""
    message = {"content": content, "role": "assistant", **fields}
    return result({"choices": [{"message": message, "finish_reason": finish}]}, usage)


def error(code: str, message: str, status: int = 400) -> Frame:
    """The error event inside a 200."""
    return error_event(Fault(code, message, status))


def refusal(code: str, message: str, status: int) -> Refuse:
    """An HTTP error with this API's body."""
    body = orjson.dumps({"code": code, "message": message, "request_id": "sim-1"})
    return Refuse(status, body, {"Content-Type": "application/json"})


class Framing:
    """Writes the frames of one answer, counting them."""

    def __init__(self, first: int = 1) -> None:
        self._next = first

    def __call__(self, step: Frame) -> bytes:
        """What this step writes."""
        if isinstance(step, Raw):
            return step.data
        named = step if isinstance(step, Named) else Named("result", step)
        number, self._next = self._next, self._next + 1
        head = (number, named.event.encode(), named.status)
        return b"id:%d\nevent:%b\n:HTTP_STATUS/%d\ndata:%b\n\n" % (*head, orjson.dumps(dict(named.data)))


def frame(step: Frame, number: int = 1) -> bytes:
    """What this step writes as the frame of this number."""
    return Framing(number)(step)


def at_once(steps: Iterable[Frame], first: int = 1) -> Raw:
    """These frames in one write, numbered from `first`."""
    return Raw(b"".join(map(Framing(first), steps)))


def byte_by_byte(steps: Iterable[Frame]) -> Iterator[Step]:
    """These frames in writes of one byte, each on its way before the next."""
    for byte in at_once(steps).data:
        yield Raw(bytes([byte]))
        yield Gap(0)
