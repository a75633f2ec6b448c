"""A worker's claim on one job of the queue."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from deltafan_worker._interrupt import Reason
from deltafan_worker._limits import Grant, Lot


class Leave(Enum):
    """How the claim is given up when the job's function has returned."""

    FINISH = "finish"
    """The job is done: tell arq."""
    PARK = "park"
    """Its model's limits have no room: whoever finds some takes it."""
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
    score: str
    """Its place in the queue, when it was claimed."""
    record: bytes | None = field(default=None, repr=False)
    """arq's record of the job, until it has been read."""
    grant: Grant | None = None
    """The call that was counted for it with the claim."""
    limited: bool = False
    """Whether some provider has asked for less, so that one must ask before each call."""
    renewed: bool = True
    """Whether the heartbeat still renews the lease."""
    leave: Leave = Leave.FINISH
    release_delay_ms: int = 0
    lot: Lot | None = None
    """Where it is to be parked."""
    due_ms: int | None = None
    """When it can not wait there any longer."""
    status: str = "running"
    """Of the job, when its function has returned."""
    notes: tuple[tuple[str, bytes], ...] = ()
    """Usage records for the ledger: model call, record."""
    interrupt: Callable[[Reason], None] | None = field(default=None, repr=False)
    """How the job's function wants to be stopped; without one its task is cancelled."""
    pending: Reason | None = None
    """Why it was to be stopped, should it not have started yet."""


def claims_of(flat: Sequence[Any], *, second: int, limited: bool, process: str, queues: Sequence[str]) -> list[Claim]:
    """The claims in an answer of claim.lua."""
    return [
        Claim(
            job_id=job_id.decode(),
            queue=queues[index - 1],
            queue_index=index,
            token=f"{process}:{number}",
            number=number,
            score=score.decode(),
            record=record,
            grant=_grant(counted.decode(), second),
            limited=limited,
            pending=Reason.ABORTED if aborted else None,
        )
        for job_id, index, score, number, aborted, record, counted in zip(*(iter(flat),) * 7, strict=True)
    ]


def _grant(counted: str, second: int) -> Grant | None:
    if not counted:
        return None
    group, tokens, number = counted.rsplit(" ", 2)
    return Grant(group=group, second=second, tokens=int(tokens), number=number)
