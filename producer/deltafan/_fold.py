"""Folding events into the generation they amount to, and the result record it is stored as."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from deltafan._events import (
    CANCELLED,
    COMPLETED,
    CONTENT,
    FAILED,
    REASONING,
    REFUSAL,
    STARTED,
    TEXT_TYPES,
    TOOL_CALL,
    Event,
    Failure,
    ToolCallDelta,
    failure_from,
)
from deltafan._position import Position
from deltafan._usage import UsageRecord

RESULT_VERSION = 1


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A whole tool call. `arguments` is the model's JSON text, unparsed: models do send broken JSON."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What a job has produced so far, or in all.

    `Generation.from_json(g.to_json()) == g`.
    """

    status: str = "queued"
    """queued, running, completed, failed or cancelled."""
    position: Position | None = None
    """The last entry folded in: pass it as `after` to tail on from here. None when nothing was."""
    content: str = ""
    reasoning: str = ""
    refusal: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: str | None = None
    usage: UsageRecord | None = None
    """The bill of the attempt that ended the job; earlier attempts' are in the ledger."""
    failure: Failure | None = None
    cancel_reason: str | None = None
    attempt_no: int = 0
    model: str | None = None
    provider: str | None = None

    @property
    def is_ended(self) -> bool:
        """Whether nothing will be added any more."""
        return self.status in (COMPLETED, FAILED, CANCELLED)

    def to_json(self) -> dict[str, Any]:
        """The result record (PROTOCOL.md, "Result")."""
        data: dict[str, Any] = {"v": RESULT_VERSION, "status": self.status, "content": self.content}
        optional: dict[str, Any] = {
            "position": str(self.position) if self.position else None,
            "reasoning": self.reasoning,
            "refusal": self.refusal,
            "tool_calls": [{"id": c.id, "name": c.name, "arguments": c.arguments} for c in self.tool_calls],
            "finish_reason": self.finish_reason,
            "usage": self.usage.to_json() if self.usage else None,
            "failure": _failure_json(self.failure),
            "cancel_reason": self.cancel_reason,
            "attempt_no": self.attempt_no,
            "model": self.model,
            "provider": self.provider,
        }
        return data | {name: value for name, value in optional.items() if value or value == 0}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Generation":
        """Read a result record; whatever a record leaves out has its default."""
        position, usage, failure = data.get("position"), data.get("usage"), data.get("failure")
        return cls(
            status=data.get("status", "queued"),
            position=Position.parse(position) if position else None,
            content=data.get("content", ""),
            reasoning=data.get("reasoning", ""),
            refusal=data.get("refusal", ""),
            tool_calls=tuple(ToolCall(c["id"], c["name"], c["arguments"]) for c in data.get("tool_calls", ())),
            finish_reason=data.get("finish_reason"),
            usage=UsageRecord.from_json(usage) if usage else None,
            failure=failure_from(failure) if failure else None,
            cancel_reason=data.get("cancel_reason"),
            attempt_no=data.get("attempt_no", 0),
            model=data.get("model"),
            provider=data.get("provider"),
        )


def fold(events: Iterable[Event]) -> Generation:
    """The generation that `events`, in stream order, amount to."""
    folding = Fold()
    for event in events:
        folding.add(event)
    return folding.generation()


class Fold:
    """`fold`, one event at a time. Linear in the text: pieces are joined when the generation is asked for."""

    def __init__(self) -> None:
        self._pieces: list[Event] = []
        self._last: Event | None = None
        self._opened: Event | None = None

    def add(self, event: Event) -> None:
        """Take the next event; its position is above that of every event before."""
        self._last = event
        if event.type in TEXT_TYPES or event.type == TOOL_CALL:
            self._pieces.append(event)
        elif event.type == STARTED:
            self._open(event)

    def _open(self, event: Event) -> None:
        self._opened = event
        started = event.started
        if started is not None and started.mode == "continue" and started.from_ is not None:
            kept = started.from_
            self._pieces = [piece for piece in self._pieces if piece.position <= kept]
        else:
            self._pieces = []

    def generation(self) -> Generation:
        """What has been folded so far."""
        last, started = self._last, self._opened.started if self._opened else None
        return Generation(
            status=self._status(),
            position=last.position if last else None,
            content=self._text(CONTENT),
            reasoning=self._text(REASONING),
            refusal=self._text(REFUSAL),
            tool_calls=merge_tool_calls(piece.tool_call for piece in self._pieces),
            finish_reason=last.finish_reason if last else None,
            usage=last.usage if last else None,
            failure=last.failure if last else None,
            cancel_reason=last.cancel_reason if last else None,
            attempt_no=started.attempt_no if started else 0,
            model=started.model if started else None,
            provider=started.provider if started else None,
        )

    def _status(self) -> str:
        if self._last is None:
            return "queued"
        return self._last.type if self._last.is_terminal else "running"

    def _text(self, type_: str) -> str:
        return b"".join([piece.data for piece in self._pieces if piece.type == type_]).decode()


def merge_tool_calls(fragments: Iterable[ToolCallDelta | None]) -> tuple[ToolCall, ...]:
    """Join fragments by index. A call without any argument text gets `{}`, which is what it means."""
    ids: dict[int, str] = {}
    names: dict[int, str] = {}
    arguments: dict[int, list[str]] = {}
    for fragment in fragments:
        if fragment is None:
            continue
        arguments.setdefault(fragment.index, []).append(fragment.arguments)
        if fragment.id:
            ids.setdefault(fragment.index, fragment.id)
        if fragment.name:
            names.setdefault(fragment.index, fragment.name)
    return tuple(
        ToolCall(ids.get(index, ""), names.get(index, ""), "".join(arguments[index]) or "{}")
        for index in sorted(arguments)
    )


def _failure_json(failure: Failure | None) -> dict[str, Any] | None:
    if failure is None:
        return None
    return {"code": failure.code, "message": failure.message, "retryable": failure.retryable}
