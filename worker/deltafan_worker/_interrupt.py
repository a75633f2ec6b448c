"""Interrupts: reasons to cut a run short from outside, and the only way in which that may happen."""

import asyncio
from collections.abc import Coroutine
from enum import Enum
from typing import Any, TypeVar

T = TypeVar("T")


class Reason(Enum):
    """Why a run is cut short. Not errors of the run: each has its own ending."""

    CANCELLED = "cancelled"
    """Somebody asked for the job's end; the request is recorded in the job's state."""
    ABORTED = "aborted"
    """The same by arq's Job.abort(): the request is recorded in the queue only."""
    DEADLINE = "deadline"
    """The job's own deadline has passed."""
    HAND_OVER = "hand_over"
    """This worker is shutting down; another goes on."""
    LEASE_LOST = "lease_lost"
    """Another worker has claimed the job."""
    FENCED = "fenced"
    """Another attempt owns the job's stream."""
    ENDED = "ended"
    """The job has a terminal entry that is not ours."""
    STREAM_LOST = "stream_lost"
    """The server lost the stream more often than we are willing to write it again."""


class Interrupt:
    """Cuts one run short; the first reason stays.

    Only what is awaited through `run` is ever cancelled, so a job that is being finished can not be torn apart.
    """

    def __init__(self) -> None:
        self.reason: Reason | None = None
        self.was_aborted = False
        """Whether arq's abort was asked for, at any time."""
        self.detail = ""
        """In the words of whoever asked, where somebody did."""
        self._timeout: asyncio.Timeout | None = None

    def cut(self, reason: Reason, detail: str = "") -> None:
        """Stop what is being run, or will be."""
        self.was_aborted = self.was_aborted or reason is Reason.ABORTED
        if self.reason is None:
            self.reason, self.detail = reason, detail
            if self._timeout is not None and not self._timeout.expired():
                self._timeout.reschedule(asyncio.get_running_loop().time())

    async def run(self, work: Coroutine[Any, Any, T], *, within_s: float | None = None) -> T | None:
        """The value of `work`; None when it was cut short, by `cut` or (reason DEADLINE) because its time was over."""
        if self.reason is not None:
            work.close()
            return None
        try:
            async with asyncio.timeout(within_s) as self._timeout:
                return await work
        except TimeoutError:
            if self.reason is None:
                self.reason = Reason.DEADLINE
            return None
        finally:
            self._timeout = None
