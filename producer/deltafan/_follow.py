"""What a reader may take from a stream: the rules of contiguity, without any I/O.

An attempt's entries are numbered without holes, so a reader knows from an id alone whether something is missing:
the next entry is either the next number of the same attempt, or number 0 of a later one. Anything else is a hole.
A hole is never passed over: the writer either mends it, or opens an attempt that starts from nothing.
"""

from collections.abc import Sequence
from functools import partial
from itertools import repeat
from typing import TypeAlias

import orjson

from deltafan._events import KNOWN_TYPES, STARTED, TERMINAL_TYPES, Event
from deltafan._position import Position

RawEntry: TypeAlias = tuple[bytes, Sequence[bytes]]
"""An entry as XRANGE gives it: id, then `type`, its value, `data`, its value."""

_new = tuple.__new__
"""What the `__new__` of a named tuple calls. A third of the time to take an entry went into that."""
_position_of, _event_of = partial(_new, Position), partial(_new, Event)
_MANY = 8
"""Entries; fewer are taken one by one as fast."""
_TYPE_NAMES = {name.encode(): name for name in KNOWN_TYPES}


class Follower:
    """One reader's cursor. Feed it what was read after the cursor; get the events to deliver."""

    def __init__(self, after: Position | None = None) -> None:
        self.cursor = after
        self.ended = False
        """Whether the terminal event has been delivered."""
        self._beyond: Position | None = None
        """Behind a hole: how far the stream has been looked through for a new start."""

    @property
    def range_start(self) -> str:
        """Where to read on: the lower bound for XRANGE."""
        at = self._beyond or self.cursor
        return "-" if at is None else f"({at}"

    def look_again(self) -> None:
        """Read on from the cursor: a failover may have taken a hole away together with what lay behind it."""
        self._beyond = None

    def follow(self, other: "Follower") -> None:
        """Stand where another stands that has read the same entries."""
        self.cursor, self.ended, self._beyond = other.cursor, other.ended, other._beyond  # noqa: SLF001  its own kind

    def take(self, entries: Sequence[RawEntry]) -> list[Event]:
        """Move over `entries`, in stream order, and return the events among them.

        Entries at or below the cursor are skipped, so reading twice is harmless. At a hole the cursor stays, unless
        an attempt follows that starts from nothing. Entries of unknown types move the cursor and are left out.
        """
        if len(entries) >= _MANY and (many := self._take_run(entries)):
            return many
        events: list[Event] = []
        append, kinds = events.append, _TYPE_NAMES
        attempt, seq = self.cursor or (0, -1)
        hole = self._beyond is not None
        for raw_id, fields in entries:
            if not hole and raw_id == b"%d-%d" % (attempt, seq + 1):  # nearly every entry: no need to read its id
                entry = _new(Position, (attempt, seq + 1))
            else:
                entry = Position.parse(raw_id)
                if entry <= (attempt, seq):
                    continue
                hole = hole and not _starts_from_nothing(fields) if entry.seq == 0 else True
                if hole:
                    continue
            if self.ended:
                break
            attempt, seq = entry
            kind = kinds.get(fields[1])
            if kind is not None:
                append(_new(Event, (entry, kind, fields[3])))
                self.ended = kind in TERMINAL_TYPES
        if seq >= 0:
            self.cursor = Position(attempt, seq)
        if entries:
            self._beyond = Position.parse(entries[-1][0]) if hole else None
        return events

    def _take_run(self, entries: Sequence[RawEntry]) -> list[Event]:
        """`take` in half the time, of a page that goes on where the cursor stands; empty where it is none.

        Ids in a stream grow: if the first and the last are as many apart as there are entries, none is missing.
        """
        if self.cursor is None or self.ended or self._beyond is not None:
            return []
        (attempt, seq), count = self.cursor, len(entries)
        if entries[0][0] != b"%d-%d" % (attempt, seq + 1) or entries[-1][0] != b"%d-%d" % (attempt, seq + count):
            return []
        kinds = [_TYPE_NAMES.get(fields[1]) for _, fields in entries]
        if None in kinds or not TERMINAL_TYPES.isdisjoint(kinds[:-1]):
            return []
        positions = map(_position_of, zip(repeat(attempt), range(seq + 1, seq + count + 1)))
        events = list(map(_event_of, zip(positions, kinds, [fields[3] for _, fields in entries], strict=True)))
        self.cursor, self.ended = events[-1].position, kinds[-1] in TERMINAL_TYPES
        return events


def _starts_from_nothing(fields: Sequence[bytes]) -> bool:
    """Whether an entry with seq 0 owes nothing to what came before: it is terminal, or `started` without `continue`."""
    return fields[1] != STARTED.encode() or orjson.loads(fields[3]).get("mode") != "continue"
