"""Events: the entries of a job's stream, and what each type's data holds (PROTOCOL.md, "Entries")."""

from base64 import b64decode
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import orjson

from deltafan._errors import ProtocolError
from deltafan._position import Position
from deltafan._usage import UsageRecord

STARTED: Final = "started"
REASONING: Final = "reasoning"
CONTENT: Final = "content"
REFUSAL: Final = "refusal"
TOOL_CALL: Final = "tool_call"
AUDIO: Final = "audio"
ANNOTATION: Final = "annotation"
COMPLETED: Final = "completed"
FAILED: Final = "failed"
CANCELLED: Final = "cancelled"

TEXT_TYPES: Final = frozenset({REASONING, CONTENT, REFUSAL})
DELTA_TYPES: Final = TEXT_TYPES | {TOOL_CALL, AUDIO, ANNOTATION}
TERMINAL_TYPES: Final = frozenset({COMPLETED, FAILED, CANCELLED})
KNOWN_TYPES: Final = DELTA_TYPES | TERMINAL_TYPES | {STARTED}


@dataclass(frozen=True, slots=True)
class Started:
    """Opens an attempt. Modes `restart` and `replay` void what a reader has, `continue` keeps it up to `from_`."""

    attempt: int
    run: str
    mode: str
    from_: Position | None
    attempt_no: int
    worker: str
    provider: str
    model: str
    api: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A fragment of one tool call. `id` and `name` come once per index; `arguments` fragments are concatenated."""

    index: int
    id: str | None
    name: str | None
    arguments: str = field(repr=False)
    extra: Mapping[str, Any] | None = field(default=None, repr=False)
    """What the provider wants to be sent back with the call, untouched (Gemini: `extra_content`)."""


@dataclass(frozen=True, slots=True)
class AudioDelta:
    """A piece of speech. `pcm` is what the provider sent, decoded: 16 bit, mono, 24 kHz, without a header."""

    pcm: bytes = field(repr=False)
    transcript: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a job failed. `code` is stable; `retryable` says whether the same request may succeed later."""

    code: str
    message: str
    retryable: bool


class Delta(NamedTuple):
    """A piece of output without a place in the stream yet: what a decoder yields."""

    type: str
    data: bytes

    def __repr__(self) -> str:
        return f"Delta({self.type}, {len(self.data)} bytes)"


class Event(NamedTuple):
    """One entry of a job's stream.

    A tuple and lazily decoded, because a replay makes hundreds of thousands of them a second.
    """

    position: Position
    type: str
    data: bytes

    def __repr__(self) -> str:
        # Without the data: what a model has said belongs into no log.
        return f"Event({self.position}, {self.type}, {len(self.data)} bytes)"

    @property
    def is_terminal(self) -> bool:
        """Whether this is the stream's last entry, for ever."""
        return self.type in TERMINAL_TYPES

    @property
    def is_delta(self) -> bool:
        """Whether this carries a piece of output."""
        return self.type in DELTA_TYPES

    @property
    def text(self) -> str:
        """The text of a `reasoning`, `content` or `refusal` event; "" for every other type."""
        return self.data.decode() if self.type in TEXT_TYPES else ""

    @property
    def payload(self) -> Mapping[str, Any]:
        """The JSON object of a `started`, `tool_call` or terminal event; empty for text.

        Raises:
            ProtocolError: the data is not a JSON object.
        """
        return {} if self.type in TEXT_TYPES else _json_object(self)

    @property
    def started(self) -> Started | None:
        """The opening of an attempt; None for every other type."""
        if self.type != STARTED:
            return None
        data = _json_object(self)
        origin = data.get("from")
        return Started(
            attempt=self.position.attempt,
            run=str(data.get("run", "")),
            mode=str(data.get("mode", "fresh")),
            from_=Position.parse(origin) if origin else None,
            attempt_no=int(data.get("attempt_no", 1)),
            worker=str(data.get("worker", "")),
            provider=str(data.get("provider", "")),
            model=str(data.get("model", "")),
            api=str(data.get("api", "")),
        )

    @property
    def tool_call(self) -> ToolCallDelta | None:
        """The fragment of a `tool_call` event; None for every other type."""
        if self.type != TOOL_CALL:
            return None
        data = _json_object(self)
        index, arguments = int(data.get("index", 0)), data.get("arguments") or ""
        return ToolCallDelta(index, data.get("id"), data.get("name"), arguments, data.get("extra"))

    @property
    def audio(self) -> AudioDelta | None:
        """The speech of an `audio` event; None for every other type.

        Raises:
            ProtocolError: the data is not base64.
        """
        if self.type != AUDIO:
            return None
        data = _json_object(self)
        try:
            return AudioDelta(b64decode(data.get("data") or "", validate=True), data.get("transcript") or "")
        except ValueError as error:
            raise ProtocolError(f"entry {self.position} has audio that is not base64: {error}") from error

    @property
    def annotation(self) -> Mapping[str, Any] | None:
        """A source, as the provider describes it (`url`, `title` …); None for every other type than `annotation`."""
        return _json_object(self) if self.type == ANNOTATION else None

    @property
    def finish_reason(self) -> str | None:
        """Why the model stopped; only `completed` has it."""
        return self.payload.get("finish_reason") if self.type == COMPLETED else None

    @property
    def usage(self) -> UsageRecord | None:
        """The usage record of a terminal event, where the attempt called a model."""
        record = self.payload.get("usage") if self.is_terminal else None
        return UsageRecord.from_json(record) if record else None

    @property
    def failure(self) -> Failure | None:
        """What went wrong, for `failed`; None for every other type."""
        return failure_from(self.payload) if self.type == FAILED else None

    @property
    def cancel_reason(self) -> str | None:
        """Who or what cancelled the job, for `cancelled`; None for every other type."""
        return str(self.payload.get("reason", "")) if self.type == CANCELLED else None


def failure_from(data: Mapping[str, Any]) -> Failure:
    """Read the failure that a `failed` entry or a result carries."""
    return Failure(str(data.get("code", "unknown")), str(data.get("message", "")), bool(data.get("retryable", False)))


def tool_call_data(
    index: int,
    *,
    call_id: str | None = None,
    name: str | None = None,
    arguments: str = "",
    extra: Mapping[str, Any] | None = None,
) -> bytes:
    """The data of a `tool_call` entry: absent fields are left out."""
    data: dict[str, Any] = {"index": index}
    if call_id is not None:
        data["id"] = call_id
    if name is not None:
        data["name"] = name
    if arguments:
        data["arguments"] = arguments
    if extra:
        data["extra"] = extra
    return orjson.dumps(data)


def audio_data(base64: str, transcript: str) -> bytes:
    """The data of an `audio` entry: absent fields are left out."""
    fields = {"data": base64, "transcript": transcript}
    return orjson.dumps({name: value for name, value in fields.items() if value})


def _json_object(event: Event) -> Mapping[str, Any]:
    try:
        data = orjson.loads(event.data)
    except orjson.JSONDecodeError as error:
        raise ProtocolError(f"entry {event.position} of type {event.type} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ProtocolError(f"entry {event.position} of type {event.type} is not a JSON object")
    return data
