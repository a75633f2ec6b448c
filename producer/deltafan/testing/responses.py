"""The Responses API as it is streamed: its events, their framing, and whole answers made of them."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import orjson

from deltafan.testing._answer import DEFAULT_USAGE, Answer, Fault, Text
from deltafan.testing._responses_answer import event, fault_events, state, streamed, usage_object
from deltafan.testing._steps import Cut, Dialect, Frame, Gap, Named, Raw, Refuse, Step

__all__ = [
    "COMMENT",
    "USAGE",
    "Cut",
    "Frame",
    "Framing",
    "Gap",
    "Named",
    "Raw",
    "Refuse",
    "Step",
    "at_once",
    "byte_by_byte",
    "completed",
    "delta",
    "error",
    "event",
    "failed",
    "flat_error",
    "frame",
    "incomplete",
    "item_added",
    "item_done",
    "opening",
    "refusal",
    "render",
    "state",
    "text",
    "usage_object",
]

USAGE = usage_object(DEFAULT_USAGE)
COMMENT = Raw(b": keep-alive\n\n")


def render(
    answer: Answer,
    *,
    dialect: Dialect = "openai",
    background: bool = False,
    summary: bool = False,
    include_obfuscation: bool = True,
) -> list[Step]:
    """The steps of this answer. With `summary` reasoning is shown as a summary, else as raw text."""
    steps = streamed(answer, dialect=dialect, background=background, summary=summary)
    # The one capture of a background stream has none.
    if dialect == "dashscope" or background or not include_obfuscation:
        return [*steps]
    return [_obfuscated(step) for step in steps]


def text(*pieces: str, usage: Mapping[str, Any] | None = USAGE) -> list[Step]:
    """An ordinary answer: one text delta a piece, with all events around them."""
    *body, last = render(Answer([Text(piece) for piece in pieces]), include_obfuscation=False)
    assert isinstance(last, dict)
    return [*body, {**last, "response": {**last["response"], "usage": usage}}]


def opening() -> list[Frame]:
    """What comes before the first item."""
    return [state("created", "in_progress"), state("in_progress", "in_progress")]


def item_added(item: Mapping[str, Any], index: int = 0) -> Frame:
    """An output item begins."""
    return event("response.output_item.added", output_index=index, item=item)


def item_done(item: Mapping[str, Any], index: int = 0) -> Frame:
    """An output item is whole."""
    return event("response.output_item.done", output_index=index, item=item)


def delta(kind: str, piece: str, **fields: Any) -> Frame:
    """A delta such as `output_text`, `reasoning_text`, `refusal` or `function_call_arguments`."""
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    return event(f"response.{kind}.delta", **{**place, "delta": piece, **fields})


def completed(output: Iterable[Mapping[str, Any]] = (), usage: Mapping[str, Any] | None = USAGE) -> Frame:
    """The end of a whole answer."""
    return state("completed", "completed", output=[*output], usage=usage)


def incomplete(reason: str = "max_output_tokens", usage: Mapping[str, Any] | None = USAGE) -> Frame:
    """The end of an answer that was cut short, by its limit or by a filter."""
    return state("incomplete", "incomplete", usage=usage, incomplete_details={"reason": reason})


def failed(code: str, message: str) -> Frame:
    """The end of an answer that failed."""
    return state("failed", "failed", error={"code": code, "message": message})


def error(code: str, message: str) -> list[Frame]:
    """An error in the middle of a 200 as OpenAI really sends it: nested, and then `response.failed` as well."""
    return [*fault_events(Fault(code, message), "openai")]


def flat_error(code: str, message: str) -> Frame:
    """An error in the middle of a 200 as OpenAI's types have it."""
    return event("error", code=code, message=message, param=None)


def refusal(code: str, message: str, status: int, dialect: Dialect = "openai") -> Refuse:
    """An HTTP error with this API's body."""
    nested = {"error": {"message": message, "type": code, "param": None, "code": code}}
    flat = {"code": code, "message": message, "request_id": "sim-1"}
    body = orjson.dumps(nested if dialect == "openai" else flat)
    return Refuse(status, body, {"Content-Type": "application/json"})


class Framing:
    """Writes the events of one response, and adds what goes on from one to the next.

    An event without a `sequence_number` gets the next one, with None it has none. A `response` object is completed with
    the id, the model and all that came before.
    """

    def __init__(
        self, response_id: str = "resp_1", model: str = "sim", dialect: Dialect = "openai", *, first: int = 0
    ) -> None:
        self.number = first - 1
        """The last one written."""
        self.response: dict[str, Any] = {"id": response_id, "object": "response", "created_at": 1, "model": model}
        """As it now is."""
        self.response |= {"status": "queued", "background": False, "output": [], "error": None, "usage": None}
        self.response |= {"incomplete_details": None, "parallel_tool_calls": True, "tool_choice": "auto", "tools": []}
        self._dialect = dialect

    def __call__(self, step: Frame) -> bytes:
        """What this step writes."""
        if isinstance(step, Raw):
            return step.data
        named = step if isinstance(step, Named) else Named(str(step.get("type", "message")), step)
        body = self._body(named.data)
        data = orjson.dumps(body)
        if self._dialect == "openai":
            return b"event: %b\ndata: %b\n\n" % (named.event.encode(), data)
        head = (self.number + 1, named.event.encode(), named.status)
        return b"id:%d\nevent:%b\n:HTTP_STATUS/%d\ndata:%b\n\n" % (*head, data)

    def _body(self, data: Mapping[str, Any]) -> dict[str, Any]:
        body = {"sequence_number": self.number + 1, **data}
        self.number += 1
        if body["sequence_number"] is None:
            del body["sequence_number"]
        else:
            self.number = body["sequence_number"]
        if isinstance(told := body.get("response"), Mapping):
            body["response"] = {**self.response, **told}
            # An empty model, as in DashScope's first event, is only how it begins.
            self.response |= {name: value for name, value in told.items() if name != "model"}
        return body


def frame(step: Frame, number: int = 0) -> bytes:
    """What this step writes as the event of this number."""
    return Framing(first=number)(step)


def at_once(steps: Iterable[Frame], first: int = 0) -> Raw:
    """These frames in one write, numbered from `first`."""
    return Raw(b"".join(map(Framing(first=first), steps)))


def byte_by_byte(steps: Iterable[Frame]) -> Iterator[Step]:
    """These frames in writes of one byte, each on its way before the next."""
    for byte in at_once(steps).data:
        yield Raw(bytes([byte]))
        yield Gap(0)


def _obfuscated(step: Step) -> Step:
    if isinstance(step, dict) and str(step.get("type")).endswith(".delta"):
        return {**step, "obfuscation": "sim"}
    return step
