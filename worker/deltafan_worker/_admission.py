"""One job's way through the limits of the providers it may ask."""

import asyncio
import random
import time
from collections.abc import Sequence

from deltafan._request import JobRequest
from deltafan_worker._claim import Claim
from deltafan_worker._ending import CallMeter
from deltafan_worker._limits import FleetLimits, Grant, Lot, Refusal, Size, Used, group_of
from deltafan_worker._route import Route
from deltafan_worker._upstream_error import UpstreamError
from deltafan_worker._usage import normalise

LONGEST_WAIT_S = 60.0
"""A job that has called holds its slot for no longer, waiting for room to call again."""
LONGEST_PAUSE_S = 3600.0
"""For so long one word of a provider keeps batch jobs away from it."""
_LOOK_S = 1.0


class MustWait(Exception):
    """A batch job is to give its slot back until there is room in `lot`."""

    def __init__(self, lot: Lot) -> None:
        self.lot = lot
        super().__init__(lot.group)


class Admission:
    """What a job may still call, and what it has called.

    Where nobody has set limits, and no provider has asked for less, nothing is asked.
    """

    def __init__(self, limits: FleetLimits, claim: Claim, request: JobRequest, *, quota_pause_s: float) -> None:
        self._limits = limits
        self._claim = claim
        self.is_patient = request.lane == "batch"
        self._request = request
        self._quota_pause_s = quota_pause_s
        self._unused = claim.grant
        self._running: Grant | None = None
        self._failed: UpstreamError | None = None
        self._failed_at = ""
        self._size: Size | None = None

    async def choose(self, routes: Sequence[Route]) -> Sequence[Route]:
        """The routes, those first that have room.

        Raises:
            MustWait: none has; nothing was begun, so the job can wait in line for the first.
        """
        first: Lot | None = None
        for index, route in enumerate(routes):
            if self._has_grant(route):
                return [*routes[index:], *routes[:index]]
        for index, route in enumerate(routes):
            if not self._is_limited(route):
                return [*routes[index:], *routes[:index]]
            answer = await self._ask(route, in_line=True)
            if isinstance(answer, Grant):
                self.give_back()
                self._unused = answer
                return [*routes[index:], *routes[:index]]
            first = first or answer
        if first is not None:
            raise MustWait(first)
        return routes

    async def enter(self, route: Route) -> None:
        """Count a call that is about to be made.

        Raises:
            MustWait: a batch job has to wait.
            UpstreamError: an interactive one had to wait for too long, or one that failed, to try again.
        """
        if self._has_grant(route):
            self._running, self._unused = self._unused, None
            return
        self.give_back()  # it was for another provider
        if not self._is_limited(route):
            return
        waited_until = time.monotonic() + LONGEST_WAIT_S
        while isinstance(answer := await self._ask(route, in_line=False), Lot):
            if self._may_line_up(route):
                raise MustWait(answer)
            if time.monotonic() > waited_until:
                if self._failed is not None:
                    raise self._failed
                message = f"no room within the limits of {answer.group} for {LONGEST_WAIT_S:g} s"
                raise UpstreamError(code="limit_reached", message=message, retryable=True)
            await asyncio.sleep(_LOOK_S * (0.5 + random.random()))
        self._running = answer

    def leave(self, meter: CallMeter, *, answered: bool) -> None:
        """Tell what the call used."""
        grant, self._running = self._running, None
        if grant is None:
            return
        counts = normalise(meter.raw_usage) if meter.raw_usage is not None else None
        used = Used(None, None, answered)
        if counts is not None and counts.total_tokens is not None:
            used = Used(counts.total_tokens, counts.output_tokens, answered)
        elif not answered and meter.deltas == 0:
            used = Used(min(grant.tokens, self._sized().input_tokens), None, answered)  # it was not begun
        self._limits.settle(grant, self._claim.job_id, used)

    def give_back(self) -> None:
        """Nothing was called after all."""
        grant, self._unused = self._unused, None
        if grant is not None:
            self._limits.settle(grant, self._claim.job_id, Used(0, None, answered=False, made=False))

    def failed(self, route: Route, error: UpstreamError, pause_s: float) -> None:
        """A call has failed. If the provider asks for less, or for money, batch jobs leave it alone for a while."""
        if error.is_rate_limit or error.is_exhausted:
            pause_s = self._quota_pause_s if error.is_exhausted else min(pause_s, LONGEST_PAUSE_S)
            words = f"{error.code}: {error.message}"
            kind: Refusal = "rate"
            if error.is_exhausted:
                kind = "model_quota" if error.is_of_model else "quota"
            self._limits.refused(route, kind, pause_s=pause_s, words=words)
            self._claim.limited = True
        else:
            self._failed, self._failed_at = error, group_of(route)

    def step_aside(self, route: Route, error: UpstreamError) -> None:
        """The last provider has failed; that it asks for less need not fail the job.

        Raises:
            MustWait: a batch job can wait for it.
        """
        if self.is_patient and (error.is_rate_limit or error.is_exhausted):
            raise MustWait(Lot(group=group_of(route), size=self._sized()))

    def _may_line_up(self, route: Route) -> bool:
        """Whether a job may wait in line for this call. What has failed is forgotten there, so not to try it again.

        Nor a second time, or a job that all its providers fail would go from one's line to the other's for ever.
        """
        has_failed_elsewhere = self._claim.grant is None and self._failed_at != group_of(route)
        return self.is_patient and (self._failed is None or has_failed_elsewhere)

    def _is_limited(self, route: Route) -> bool:
        return bool(route.limits) or bool(route.provider_limits) or self._claim.limited

    def _has_grant(self, route: Route) -> bool:
        return self._unused is not None and self._unused.group == group_of(route)

    def _sized(self) -> Size:
        if self._size is None:
            self._size = Size.of(self._request.body)
        return self._size

    async def _ask(self, route: Route, *, in_line: bool) -> Grant | Lot:
        line = self._claim.queue if in_line else ""
        urgent = not self.is_patient
        return await self._limits.ask(route, self._sized(), self._claim.job_id, urgent=urgent, line=line)
