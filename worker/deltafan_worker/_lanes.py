"""Lanes: which queue may fill how many of a worker's slots."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TypeAlias

Pass: TypeAlias = tuple[int, int]
"""One look at a queue: its index, and how many jobs of it may be taken with this look and those before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """How two lanes share the slots of a worker."""

    interactive: float = 0.1
    """Of the slots, kept free of batch jobs, so that an interactive one never waits for a batch job's end."""
    batch: float = 0.1
    """Of the slots, for batch jobs even while interactive ones wait, once patience is over."""
    patience_s: float = 10.0
    """So long batch jobs wait at a worker that is full of interactive ones."""


class Slots:
    """Divides free slots between queues: the first one's jobs are urgent, the second one's take what is idle.

    A worker of one slot keeps none free: with it, patience alone decides.
    """

    def __init__(
        self, queues: int, concurrency: int, shares: Shares, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._queues = queues
        self._concurrency = concurrency
        self._patience_s = shares.patience_s
        self._clock = clock
        self._most_patient = concurrency - min(concurrency - 1, ceil(concurrency * shares.interactive))
        self._due_patient = max(1, int(concurrency * shares.batch)) if shares.batch else 0
        self._waiting_since: float | None = None

    def passes(self, running: Mapping[int, int]) -> list[Pass]:
        """In which order to look at the queues, given how many jobs of each (by index, from 1) are running."""
        room = self._concurrency - sum(running.values())
        if self._queues == 1:
            return [(1, room)] if room > 0 else []
        patient = self._room(running)
        aged = min(patient, self._due_patient - running.get(2, 0)) if self._is_overdue() else 0
        passes = [(2, aged), (1, room), (2, patient)]
        return [(index, most) for index, most in passes if most > 0]

    def note(self, running: Mapping[int, int], left: Sequence[int]) -> None:
        """Learn from a claim which queues have due jobs left."""
        if self._queues == 1 or not left[1]:
            self._waiting_since = None
        elif self._waiting_since is None and running.get(2, 0) < self._due_patient and not self._room(running):
            # From then on, as long as some wait, their share is theirs: short jobs would else wait anew each time.
            self._waiting_since = self._clock()

    def _room(self, running: Mapping[int, int]) -> int:
        """Slots that batch jobs may take without having waited."""
        return max(0, min(self._concurrency - sum(running.values()), self._most_patient - running.get(2, 0)))

    def _is_overdue(self) -> bool:
        return self._waiting_since is not None and self._clock() - self._waiting_since >= self._patience_s
