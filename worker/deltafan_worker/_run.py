"""The job function: one prompt job from claim to terminal entry."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias
from uuid import uuid4

import orjson

from deltafan._errors import DeltafanError, InvalidRequest
from deltafan._events import COMPLETED, FAILED
from deltafan._position import Position
from deltafan._request import JobRequest, check_job_id, parse_request
from deltafan._retention import Retention
from deltafan._usage import CallOutcome, UsageRecord
from deltafan_worker._admission import Admission, MustWait
from deltafan_worker._background import UNREADABLE
from deltafan_worker._batch_cancels import BatchCancels
from deltafan_worker._calls import ModelCalls
from deltafan_worker._claim import Claim, Leave
from deltafan_worker._ending import CallMeter, Ending, members, seal, seal_without_answer
from deltafan_worker._interrupt import Interrupt, Reason
from deltafan_worker._limits import FleetLimits
from deltafan_worker._publisher import Publisher
from deltafan_worker._resumption import Leftover, Plan, plan_onwards, read_leftover
from deltafan_worker._route import Route
from deltafan_worker._writer import (
    Begun,
    Call,
    Ended,
    Moved,
    NotOurs,
    RunLimits,
    Sealed,
    StreamWriter,
)

log = logging.getLogger("deltafan.worker")

RELEASE_DELAY_MS = 1000
"""A job that turned out to be another's is left to its owner for this long."""

_DEFECT = Ending.failed("internal_error", "a defect in the worker; its log has the details")
_LATE = Ending.failed("deadline_exceeded", "the job's deadline has passed")
_BATCH_CANCELLED = Ending.cancelled("the batch was cancelled")

Resolve: TypeAlias = Callable[[str, str], Sequence[Route]]
"""From a model's name and an API to the providers to try, in order. Raises DeltafanError where that leads nowhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A job as this run sees it: what to do, or why that is impossible."""

    id: str
    request: JobRequest | None = None
    routes: Sequence[Route] = ()
    refusal: Ending | None = None
    admission: Admission | None = None
    """None for a job that is refused."""

    @property
    def goes_on(self) -> bool:
        """Whether an answer that broke off is to be gone on with."""
        return self.request is not None and self.refusal is None and self.request.on_interrupt == "continue"


class JobRunner:
    """Runs prompt jobs; `generate` is the arq function."""

    def __init__(
        self,
        *,
        publisher: Publisher,
        calls: ModelCalls,
        resolve: Resolve,
        retention: Retention,
        worker: str,
        limits: FleetLimits,
        batches: BatchCancels,
        quota_pause_s: float = 60.0,
        max_attempts: int = 3,
    ) -> None:
        self._publisher = publisher
        self._calls = calls
        self._resolve = resolve
        self._retention = retention
        self._worker = worker
        self._limits = limits
        self._batches = batches
        self._quota_pause_s = quota_pause_s
        self._max_attempts = max_attempts

    async def generate(self, ctx: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
        """Generate one job's answer into its stream, and tell the claim how to leave the queue.

        Never raises into arq, but for a job that arq's own abort ended: outcomes are plain data.
        """
        claim: Claim = ctx["claims"][ctx["job_id"]]
        # Whatever else may end this function, a defect of ours included: arq is told only what the stream has seen.
        claim.leave, claim.release_delay_ms = Leave.RELEASE, RELEASE_DELAY_MS
        interrupt = Interrupt()
        claim.interrupt = interrupt.cut
        if claim.pending is not None:
            interrupt.cut(claim.pending)
        job = self._read(claim, fields)
        retention = self._retention.with_ttl(job.request.ttl if job.request else None)
        writer = StreamWriter(self._publisher, job.id, claim.number, retention, interrupt)
        try:
            await self._attempts(job, writer, claim)
        except MustWait as wait:
            claim.status = "queued"
            if not interrupt.was_aborted:  # else whoever claims it next ends it, and need not wait for room
                claim.leave, claim.lot = Leave.PARK, wait.lot
                claim.due_ms = job.request.deadline_ms if job.request else None
        except Exception:
            if writer.run:  # counted: it is run again, and not for ever
                raise
            log.exception("job %s: ends here, since it would fail like this for ever", job.id)
            await self._attempts(_Job(id=job.id, request=job.request, refusal=_DEFECT), writer, claim)
        finally:
            writer.close()
            if job.admission is not None:
                job.admission.give_back()
        if interrupt.reason is Reason.ABORTED and claim.status == "cancelled":
            raise asyncio.CancelledError
        return {"job_id": job.id, "status": claim.status}

    async def end_unrun(self, claim: Claim, outcome: Any) -> None:
        """Write the terminal entry of a job that arq ends without calling us: its record is gone or unreadable."""
        ending = Ending.failed("not_run", f"the queue gave the job up: {outcome}")
        writer = StreamWriter(self._publisher, claim.job_id, claim.number, self._retention, Interrupt())
        try:
            await self._attempts(_Job(id=claim.job_id, refusal=ending), writer, claim)
        finally:
            writer.close()

    def _read(self, claim: Claim, fields: Mapping[str, Any]) -> _Job:
        job_id = claim.job_id
        try:
            check_job_id(job_id)
            request = parse_request(fields)
            routes = [_as_asked(route, request) for route in self._resolve(request.model, request.api)]
            if _left_s(request) == 0.0:
                return _Job(id=job_id, request=request, routes=routes, refusal=_LATE)
            admission = Admission(self._limits, claim, request, quota_pause_s=self._quota_pause_s)
            return _Job(id=job_id, request=request, routes=routes, admission=admission)
        except DeltafanError as error:
            code = "invalid_request" if isinstance(error, InvalidRequest) else error.code
            return _Job(id=job_id, refusal=Ending.failed(code, str(error)))
        except Exception:
            log.exception("job %s: can not be read", job_id)
            return _Job(id=job_id, refusal=_DEFECT)

    async def _attempts(self, job: _Job, writer: StreamWriter, claim: Claim) -> None:
        """Run attempts until one ends the job, or it is another's, or it is to wait."""
        if job.admission is not None:
            self._calls.prepare(job.routes)
        if job.request is not None and await self._batches.covers(job.request):
            job = replace(job, refusal=_BATCH_CANCELLED, admission=None)
        leftover = await self._left_by_others(job, writer, claim)
        if job.admission is not None and leftover.response is None:
            chosen = await self._choose(job, job.admission, writer, claim)
            if not isinstance(chosen, _Job):
                self._settle(claim, chosen, writer, None)
                return
            job = chosen
        verdict, meter, plan = await self._begin(job, writer, leftover)
        while isinstance(verdict, Begun):
            try:
                ending = await self._generate(job, writer, meter, plan)
            except MustWait:
                note = _note(meter, writer, "failed") if meter and meter.was_taken else b""
                if await writer.hand_over(note, unless_cancelled=True):
                    raise
                ending = _DEFECT  # never read: the cancel whose reason is in the state wins, or the job is another's
            if ending is None:
                await self._let_go(writer, meter, claim)
                return
            if meter is not None and self._may_run_again(job, writer, ending, plan):
                claim.notes = _notes_of(meter, writer)  # should the job be another's by now
                leftover, note = await self._left_by_us(job, writer, ending, meter), _note(meter, writer, "interrupted")
                verdict, meter, plan = await self._begin(job, writer, leftover, note)
            else:
                verdict = await writer.finish(partial(_seal, ending, writer, meter))
        self._settle(claim, verdict, writer, meter)
        if isinstance(verdict, Ended) and verdict.status != COMPLETED:
            await self._calls.end_background(job.routes, meter.response if meter else leftover.response)

    async def _choose(
        self, job: _Job, admission: Admission, writer: StreamWriter, claim: Claim
    ) -> "_Job | Ended | NotOurs":
        """The job with those of its providers first that have room; or what became of it before it had any.

        Raises:
            MustWait: none has.
        """
        left_s = _left_s(job.request) if job.request else None
        try:
            routes = await writer.interrupt.run(admission.choose(job.routes), within_s=left_s)
        except MustWait:
            # The state that a dead worker has left says `running`: a cancel would wait for it to end the job.
            verdict = await writer.rest() if claim.number > 1 else None
            if verdict is None:
                raise
            return verdict
        if routes is not None:
            return replace(job, routes=routes)
        ending = _ending_of(writer.interrupt)
        return NotOurs() if ending is None else replace(job, refusal=ending, admission=None)

    async def _left_by_others(self, job: _Job, writer: StreamWriter, claim: Claim) -> Leftover:
        """What an earlier claim's attempt has left, for a job that may go on from it, or must end it."""
        if claim.number < 2 or job.request is None or job.request.on_interrupt != "continue":
            return Leftover()
        return await read_leftover(self._publisher, writer.events_key, writer.state_key)

    async def _left_by_us(self, job: _Job, writer: StreamWriter, ending: Ending, meter: CallMeter) -> Leftover:
        """What our own attempt has left, for the next one in its place."""
        if not job.goes_on:
            return Leftover()
        if ending.failure is not None and ending.failure.code in UNREADABLE:
            await writer.interrupt.run(self._calls.end_background(job.routes, meter.response))
            return Leftover()
        return Leftover(await writer.broken_off(), meter.response)

    async def _begin(
        self, job: _Job, writer: StreamWriter, leftover: Leftover, note: bytes = b""
    ) -> tuple[Begun | Ended | NotOurs, CallMeter | None, Plan]:
        """Open an attempt that goes on from what is left, where job and providers allow it; else one from the start."""
        anew = Plan(job.routes, job.request.body if job.request else {})
        onwards = plan_onwards(job.routes, anew.body, leftover) if job.goes_on else None
        is_run = job.request is not None and job.refusal is None
        limits = RunLimits(self._max_attempts, job.request.on_interrupt if job.request and is_run else "restart")
        for plan in (onwards, anew):
            if plan is not None:
                meter = self._meter(job, plan)
                previous_note = b"" if plan.response else note  # the call goes on, and is billed at its end
                verdict = await writer.begin(self._call(meter), limits, previous_note=previous_note, broken=plan.broken)
                if isinstance(verdict, Moved):
                    continue
                if isinstance(verdict, Begun) and plan.response is None:
                    await writer.interrupt.run(self._calls.end_background(job.routes, leftover.response))
                return verdict, meter, plan
        raise AssertionError("an attempt from the start depends on nothing that could have moved")

    async def _generate(self, job: _Job, writer: StreamWriter, meter: CallMeter | None, plan: Plan) -> Ending | None:
        """Stream one answer, or the rest of one; None when the job is to be given to another worker."""
        if job.admission is None or job.request is None or meter is None:
            return job.refusal
        left_s = _left_s(job.request)
        if left_s == 0.0:  # a timeout of 0 would still let a request out on a connection that is open
            writer.interrupt.cut(Reason.DEADLINE)
        if plan.response is not None:
            call = self._calls.listen_again(plan, plan.response, writer, meter)
        else:
            call = self._calls.answer(plan.routes, plan.body, writer, meter, job.admission)
        try:
            ending = await writer.interrupt.run(call, within_s=left_s)
        except MustWait:
            raise
        except Exception:  # the model may have been called: another run would call it again, and break as this one did
            log.exception("job %s: ends here, since its answer can not be read", job.id)
            ending = _DEFECT
        # An answer may break at the very moment at which its job is given away, or ended.
        if ending is None or (_is_broken(ending) and writer.interrupt.reason is not None):
            return _ending_of(writer.interrupt)
        return ending

    def _may_run_again(self, job: _Job, writer: StreamWriter, ending: Ending, plan: Plan) -> bool:
        """Whether an answer that broke after its first delta is generated again, or gone on with."""
        allowed = job.request is not None and job.request.on_interrupt != "fail" and writer.interrupt.reason is None
        has_begun = len(writer.log) > 0 or plan.response is not None
        return _is_broken(ending) and allowed and has_begun and writer.attempt_no < self._max_attempts

    async def _let_go(self, writer: StreamWriter, meter: CallMeter | None, claim: Claim) -> None:
        """Leave a running job to the next worker, with its bill so far."""
        claim.leave, claim.status, claim.release_delay_ms, claim.notes = Leave.RELEASE, "running", 0, ()
        if writer.interrupt.reason is Reason.HAND_OVER:
            called = meter is not None and (_was_made(meter) or meter.response is not None)
            if await writer.hand_over(_note(meter, writer, "handed_over") if called else b""):
                claim.notes = writer.with_noted(())
                return
        claim.notes = _notes_of(meter, writer)

    def _settle(self, claim: Claim, verdict: Ended | NotOurs, writer: StreamWriter, meter: CallMeter | None) -> None:
        if isinstance(verdict, Ended):
            claim.leave, claim.status, claim.notes = Leave.FINISH, verdict.status, writer.with_noted(verdict.notes)
            return
        delay_ms = 0 if writer.interrupt.reason is Reason.HAND_OVER else RELEASE_DELAY_MS
        claim.leave, claim.status, claim.release_delay_ms = Leave.RELEASE, "running", delay_ms
        claim.notes = tuple((dict(claim.notes) | dict(_notes_of(meter, writer))).items())

    def _meter(self, job: _Job, plan: Plan) -> CallMeter | None:
        if job.request is None or job.refusal is not None:
            return None
        return CallMeter(
            job_id=job.id,
            call_id=plan.response.call if plan.response else uuid4().hex,
            lane=job.request.lane,
            tenant=job.request.tenant,
            worker=self._worker,
            submitted_at_ms=job.request.submitted_at_ms,
            route=plan.routes[0],
            response_id=plan.response.id if plan.response else None,
        )

    def _call(self, meter: CallMeter | None) -> Call:
        started: dict[str, Any] = {"worker": self._worker}
        if meter is None:
            return Call("", members(started), "")
        route = meter.route
        started |= {"provider": route.provider, "model": route.model, "api": route.api}
        lost = meter.record("lost", attempt=0, attempt_no=0).to_json()
        del lost["attempt"], lost["attempt_no"]
        return Call(meter.call_id, members(started), members(lost))


def _as_asked(route: Route, request: JobRequest) -> Route:
    """The route as this job wants it used, within the job's own limits; mostly the one that all jobs share."""
    in_background = request.on_interrupt == "continue" and route.continuation == "background"
    if not (in_background or request.timeouts or request.max_output_bytes):
        return route
    timeouts = request.timeouts.model_dump(exclude_none=True) if request.timeouts else {}
    return replace(
        route,
        timeouts=route.timeouts.over(timeouts),
        max_output_bytes=min(route.max_output_bytes, request.max_output_bytes or route.max_output_bytes),
        in_background=in_background,
    )


def _left_s(request: JobRequest) -> float | None:
    """Seconds to the deadline, 0 when it has passed; None without one."""
    return None if request.deadline_ms is None else max(0.0, request.deadline_ms / 1000 - time.time())


def _seal(ending: Ending, writer: StreamWriter, meter: CallMeter | None, cancel_reason: str | None) -> Sealed:
    if cancel_reason is not None:
        ending = Ending.cancelled(cancel_reason)
    outcome: CallOutcome = "completed" if ending.status == "completed" else "cancelled"
    if ending.status == FAILED:
        outcome = "failed"
    usage = None if meter is None else _record(meter, writer, outcome, ending.finish_reason)
    position = Position(writer.attempt, len(writer.log) + 1)
    try:
        return seal(ending, writer.log, usage, position)
    except Exception:
        log.exception("job %s: ends here, since its answer can not be written", writer.job_id)
        return seal_without_answer(_DEFECT, usage, position)


def _record(
    meter: CallMeter, writer: StreamWriter, outcome: CallOutcome, finish_reason: str | None = None
) -> UsageRecord:
    attempt = {"attempt": writer.attempt, "attempt_no": writer.attempt_no}
    return meter.record(outcome, **attempt, output_bytes=writer.log.size_bytes, finish_reason=finish_reason)


def _note(meter: CallMeter | None, writer: StreamWriter, outcome: CallOutcome) -> bytes:
    return b"" if meter is None else orjson.dumps(_record(meter, writer, outcome).to_json())


def _was_made(meter: CallMeter) -> bool:
    return meter.started_at_ms is not None


def _notes_of(meter: CallMeter | None, writer: StreamWriter) -> tuple[tuple[str, bytes], ...]:
    """The bill of a call whose job is another's now; none for a response that is read on there."""
    if meter is None or not _was_made(meter) or meter.response is not None:
        return writer.with_noted(())
    return writer.with_noted([(meter.call_id, _note(meter, writer, "interrupted"))])


def _is_broken(ending: Ending) -> bool:
    """Whether there was an answer that another call, here or elsewhere, may give whole."""
    return ending.failure is not None and ending.failure.retryable


def _ending_of(interrupt: Interrupt) -> Ending | None:
    """The ending that an interrupt leads to; None when the job goes on elsewhere."""
    match interrupt.reason:
        case Reason.HAND_OVER | Reason.LEASE_LOST:
            return None
        case Reason.DEADLINE:
            return _LATE
        case Reason.STREAM_LOST:
            return Ending.failed("stream_lost", "the server lost the stream again and again; is it set to noeviction?")
        case Reason.ABORTED:
            return Ending.cancelled("aborted")
        case _:
            # For FENCED and ENDED `finish` finds out the same and writes nothing.
            return Ending.cancelled(interrupt.detail or "requested")
