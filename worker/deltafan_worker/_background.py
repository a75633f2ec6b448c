"""OpenAI's background responses: generated whether or not somebody listens, and found again by their id.

So a cut connection, or a dead worker, costs neither the answer nor its price: whoever comes next asks for the events
after the last one that was read.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from deltafan._events import Delta
from deltafan_worker._responses import ResponsesDecoder
from deltafan_worker._sse import SseDecoder, SseEvent
from deltafan_worker._upstream_error import UpstreamError

RESPONSE_LOST, RESUME_MISMATCH = "response_lost", "resume_mismatch"
UNREADABLE = (RESPONSE_LOST, RESUME_MISMATCH)
"""Codes of errors after which a response can not be read on: the answer must be begun anew."""


@dataclass(frozen=True, slots=True)
class ResponseNote:
    """Where a model call's response can be found. Its text form stands in the job's state."""

    call: str
    provider: str
    id: str

    def __str__(self) -> str:
        return f"{self.call} {self.provider} {self.id}"

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Read the text form."""
        parts = text.split(" ", 2)
        return cls(*parts) if len(parts) == 3 and all(parts) else None


class BackgroundDecoder(ResponsesDecoder):
    """Decodes a response over several connections, and tells its id as soon as it is known."""

    def __init__(self, on_id: Callable[[str], None], response_id: str | None = None) -> None:
        super().__init__()
        self.response_id = response_id
        self._on_id = on_id
        self._told = response_id is not None
        self.last_event = -1
        """Number of the last event that was read; the next connection asks for what comes after it."""

    def resume(self) -> None:
        """A new connection begins: what the last one left half-read is sent again."""
        self._sse = SseDecoder()
        self._error = None

    def _piece(self, _frame: Mapping[str, Any]) -> None:
        """None is plain: of each event the number is wanted."""

    def _take_object(self, frame: dict[str, Any], event: SseEvent) -> None:
        super()._take_object(frame, event)
        number = frame.get("sequence_number")
        if isinstance(number, int) and self._error is None:
            self.last_event = max(self.last_event, number)
        if self.response_id is not None and not self._told:
            self._told = True
            self._on_id(self.response_id)


class Unread:
    """Passes on what of a response has not been published yet, when it is read again from its beginning."""

    def __init__(self, published: Sequence[Delta], publish: Callable[[list[Delta]], None]) -> None:
        self._published = published
        self._publish = publish
        self._passed = 0

    def __call__(self, deltas: list[Delta]) -> None:
        """Take the next deltas.

        Raises:
            UpstreamError: they are not the ones that were published; the answer must be begun anew.
        """
        due = self._published[self._passed : self._passed + len(deltas)]
        if deltas[: len(due)] != list(due):
            raise UpstreamError(
                code=RESUME_MISMATCH, message="the response is not the one that was read", retryable=True
            )
        self._passed += len(due)
        if rest := deltas[len(due) :]:
            self._publish(rest)
