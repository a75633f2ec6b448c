"""What every decoder of an upstream API offers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from deltafan._events import Delta


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer has been received."""

    finish_reason: str


class Decoder(Protocol):
    """From bytes to deltas: `feed`, then `next_delta` until it is None; at the end of input `end`, then again."""

    frames: int
    """Data frames so far. Comments do not count, so this tells a silent server from a slow one."""
    finished: bool
    """The stream has said that it is over: nothing more needs to be read."""
    response_id: str | None

    @property
    def usage(self) -> Mapping[str, Any] | None:
        """The last usage object that was not empty: every one is a running total."""

    @property
    def is_whole(self) -> bool:
        """The answer has its end: what may still follow is its usage, and no error takes anything back."""

    def read_alike(self, packet: bytes) -> list[Delta]:
        """The deltas of a packet whose events are all like the one before them. Empty: it is to be fed.

        To be asked when all that was fed has been taken.
        """

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the stream."""

    def feed_whole(self, body: bytes) -> None:
        """Take the one JSON object that a server sent which ignored the wish for a stream."""

    def end(self) -> None:
        """There are no more bytes."""

    def next_delta(self) -> Delta | None:
        """The next delta, or None when more bytes are needed.

        Raises:
            UpstreamError: the stream reports or is an error; all deltas before it have been given.
        """

    def completion(self) -> Completion:
        """How the answer ended; to be asked when everything has been fed and taken.

        Raises:
            UpstreamError: it did not.
        """
