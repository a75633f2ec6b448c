"""What one reader has, by the rules of PROTOCOL.md."""

import re
import time
from dataclasses import dataclass, field

from deltafan import Event, Failure, Generation, Position

TOKEN = re.compile(r"(\d+)\.(\d+)\.(\d+);")
"""A delta says whose it is: job, call, index."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A delta that counts."""

    position: Position
    type: str
    text: str


@dataclass(slots=True)
class Transcript:
    """The deltas that count for one reader, and every rule that what it was given breaks."""

    pieces: list[Piece] = field(default_factory=list)
    position: Position | None = None
    """Where to read on."""
    status: str = ""
    """How the job ended, once the reader has its end."""
    reason: str | None = None
    """Of the end: the answer's finish_reason, the failure's code."""
    message: str = ""
    """Of a failure."""
    breaches: list[str] = field(default_factory=list)
    taken: int = 0
    """Deltas that it was given, also those that were void later."""
    restarts: int = 0
    """How often it began anew after deltas of an answer."""
    heard_s: float = field(default_factory=time.monotonic)
    """When its reader last heard of the job, on the monotonic clock."""
    runs: int = 0
    """Runs that the job had spent when this reader's answer was generated."""

    def take(self, event: Event) -> None:
        """Take the next event."""
        if self.status:
            self.breaches.append(f"{event.type} at {event.position} stands behind the end")
        if not _follows(event.position, self.position):
            self.breaches.append(f"{event.position} came after {self.position}")
        self.position = event.position
        if (started := event.started) is not None:
            self.runs = started.attempt_no
            self.restarts += started.mode == "restart" and bool(self.pieces)
            kept = started.from_ if started.mode == "continue" else None
            self.pieces = [piece for piece in self.pieces if kept is not None and piece.position <= kept]
        elif event.is_terminal:
            self._end(event.type, event.failure, event.finish_reason)
        else:
            self._add(event.position, event.type, event.data.decode())

    def take_generation(self, generation: Generation) -> None:
        """Take what a snapshot or a result has joined."""
        position = generation.position or Position(0, 0)
        for type_, text in (("reasoning", generation.reasoning), ("content", generation.content)):
            for token in TOKEN.findall(text):
                self._add(position, type_, "{}.{}.{};".format(*token))
            if junk := TOKEN.sub("", text):
                self._add(position, type_, junk)
        self.position, self.runs = generation.position, generation.attempt_no
        if generation.is_ended:
            self._end(generation.status, generation.failure, generation.finish_reason)

    def _end(self, status: str, failure: Failure | None, finish_reason: str | None) -> None:
        self.status, self.reason = status, failure.code if failure else finish_reason
        self.message = failure.message if failure else ""

    def _add(self, position: Position, type_: str, text: str) -> None:
        self.pieces.append(Piece(position, type_, text))
        self.taken += 1


def _follows(position: Position, last: Position | None) -> bool:
    """Whether an entry is the next of the same attempt, or the first of a later one."""
    if position.seq == 0:
        return last is None or position.attempt > last.attempt
    return last is not None and position == (last.attempt, last.seq + 1)
