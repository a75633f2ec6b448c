"""A worker's claim on one job of the queue."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from deltafan_worker._interrupt import Reason


class Leave(Enum):
    """How the claim is given up when the job's function has returned."""

    FINISH = "finish"
    """The job is done: tell arq."""
    RELEASE = "release"
    """It is not ours any more, or not now: another worker takes it."""


@dataclass(slots=True, kw_only=True)
class Claim:
    """What a worker process knows of a job it holds the lease of."""

    job_id: str
    queue: str
    queue_index: int
    token: str
    """The lease's value: process and claim number."""
    number: int
    """Grows with every claim of the job; what fences an older claim."""
    score: int
    renewed: bool = True
    """Whether the heartbeat still renews the lease."""
    leave: Leave = Leave.FINISH
    release_delay_ms: int = 0
    status: str = "running"
    """Of the job, when its function has returned."""
    notes: tuple[tuple[str, bytes], ...] = ()
    """Usage records for the ledger: model call, record."""
    interrupt: Callable[[Reason], None] | None = field(default=None, repr=False)
    """How the job's function wants to be stopped; without one its task is cancelled."""
