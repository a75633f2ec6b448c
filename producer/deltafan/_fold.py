"""Folding events into the generation they amount to, and the result record it is stored as."""

from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from deltafan._events import (
    ANNOTATION,
    AUDIO,
    CANCELLED,
    COMPLETED,
    CONTENT,
    DELTA_TYPES,
    FAILED,
    REASONING,
    REFUSAL,
    STARTED,
    TOOL_CALL,
    AudioDelta,
    Delta,
    Event,
    Failure,
    ToolCallDelta,
    failure_from,
)
from deltafan._messages import to_messages
from deltafan._position import Position
from deltafan._usage import UsageRecord
from deltafan._wav import wav

RESULT_VERSION = 1


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A whole tool call. `arguments` is the model's JSON text, unparsed: models do send broken JSON."""

    id: str
    name: str
    arguments: str = field(repr=False)
    extra: Mapping[str, Any] | None = field(default=None, hash=False, repr=False)
    """What the provider wants to be sent back with the call, untouched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What a job has produced so far, or in all. Its repr, like an event's, has nothing of what the model said.

    `Generation.from_json(g.to_json()) == g`.
    """

    status: str = "queued"
    """queued, running, completed, failed or cancelled."""
    position: Position | None = None
    """The last entry folded in: pass it as `after` to tail on from here. None when nothing was."""
    content: str = field(default="", repr=False)
    reasoning: str = field(default="", repr=False)
    refusal: str = field(default="", repr=False)
    tool_calls: tuple[ToolCall, ...] = ()
    pcm: bytes = field(default=b"", repr=False)
    """Speech, as the provider sent it: 16 bit, mono, 24 kHz, without a header. `audio` has one."""
    transcript: str = field(default="", repr=False)
    """Of the speech, where the provider sends one; others send the words as `content`."""
    annotations: tuple[Mapping[str, Any], ...] = field(default=(), hash=False, repr=False)
    """Sources, as the provider describes them."""
    finish_reason: str | None = None
    usage: UsageRecord | None = None
    """The bill of the attempt that ended the job; earlier attempts' are in the ledger."""
    failure: Failure | None = None
    cancel_reason: str | None = None
    attempt_no: int = 0
    model: str | None = None
    provider: str | None = None
    api: str | None = None

    @property
    def audio(self) -> bytes | None:
        """The speech as a WAV file; None when there was none."""
        return wav(self.pcm) if self.pcm else None

    def to_messages(self, *, reasoning: bool | None = None) -> list[dict[str, Any]]:
        """What the next turn's request must hold of this one, in the form of the API that generated it.

        With `responses` these are input items, else messages. `reasoning` says whether the reasoning goes along; None
        decides by the model, since some must have it back and others refuse it.
        """
        return to_messages(self, reasoning=reasoning)

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
            "tool_calls": [_tool_call_json(call) for call in self.tool_calls],
            "audio": b64encode(self.pcm).decode(),
            "transcript": self.transcript,
            "annotations": list(self.annotations),
            "finish_reason": self.finish_reason,
            "usage": self.usage.to_json() if self.usage else None,
            "failure": _failure_json(self.failure),
            "cancel_reason": self.cancel_reason,
            "attempt_no": self.attempt_no,
            "model": self.model,
            "provider": self.provider,
            "api": self.api,
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
            tool_calls=tuple(
                ToolCall(c["id"], c["name"], c["arguments"], c.get("extra")) for c in data.get("tool_calls", ())
            ),
            pcm=b64decode(data.get("audio", "")),
            transcript=data.get("transcript", ""),
            annotations=tuple(data.get("annotations", ())),
            finish_reason=data.get("finish_reason"),
            usage=UsageRecord.from_json(usage) if usage else None,
            failure=failure_from(failure) if failure else None,
            cancel_reason=data.get("cancel_reason"),
            attempt_no=data.get("attempt_no", 0),
            model=data.get("model"),
            provider=data.get("provider"),
            api=data.get("api"),
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
        if event.type in DELTA_TYPES:
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

    @property
    def deltas(self) -> list[Delta]:
        """The deltas that count so far."""
        return [Delta(piece.type, piece.data) for piece in self._pieces]

    def generation(self) -> Generation:
        """What has been folded so far."""
        last, started = self._last, self._opened.started if self._opened else None
        pcm, transcript = merge_audio(piece.audio for piece in self._pieces if piece.type == AUDIO)
        return Generation(
            status=self._status(),
            position=last.position if last else None,
            content=self._text(CONTENT),
            reasoning=self._text(REASONING),
            refusal=self._text(REFUSAL),
            tool_calls=merge_tool_calls(piece.tool_call for piece in self._pieces if piece.type == TOOL_CALL),
            pcm=pcm,
            transcript=transcript,
            annotations=tuple(piece.payload for piece in self._pieces if piece.type == ANNOTATION),
            finish_reason=last.finish_reason if last else None,
            usage=last.usage if last else None,
            failure=last.failure if last else None,
            cancel_reason=last.cancel_reason if last else None,
            attempt_no=started.attempt_no if started else 0,
            model=started.model if started else None,
            provider=started.provider if started else None,
            api=started.api if started else None,
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
    extras: dict[int, Mapping[str, Any]] = {}
    arguments: dict[int, list[str]] = {}
    for fragment in fragments:
        if fragment is None:
            continue
        arguments.setdefault(fragment.index, []).append(fragment.arguments)
        if fragment.id:
            ids.setdefault(fragment.index, fragment.id)
        if fragment.name:
            names.setdefault(fragment.index, fragment.name)
        if fragment.extra:
            extras.setdefault(fragment.index, fragment.extra)
    return tuple(
        ToolCall(ids.get(index, ""), names.get(index, ""), "".join(arguments[index]) or "{}", extras.get(index))
        for index in sorted(arguments)
    )


def merge_audio(deltas: Iterable[AudioDelta | None]) -> tuple[bytes, str]:
    """All speech and its transcript."""
    pieces = [delta for delta in deltas if delta is not None]
    return b"".join(piece.pcm for piece in pieces), "".join(piece.transcript for piece in pieces)


def _tool_call_json(call: ToolCall) -> dict[str, Any]:
    data: dict[str, Any] = {"id": call.id, "name": call.name, "arguments": call.arguments}
    return data | ({"extra": call.extra} if call.extra else {})


def _failure_json(failure: Failure | None) -> dict[str, Any] | None:
    if failure is None:
        return None
    return {"code": failure.code, "message": failure.message, "retryable": failure.retryable}
