"""LeasedWorker: an arq worker whose jobs have leases.

It speaks arq's records and keys, so stock producers, `Job.status()`, `.result()`, `.abort()` and even stock workers on
the same queue go on working. Three things differ from arq 0.28. A job is claimed by one script, which moves it off
the queue's head, so running jobs never hide waiting ones. A lease is renewed by heartbeat instead of set to the
longest timeout, so the jobs of a killed worker run again within seconds. And an idle worker waits at a doorbell, so a
job starts within milliseconds; polling stays as the fallback for producers that do not ring. When Redis goes away the
worker waits for it, and jobs that run go on.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeAlias
from uuid import uuid4

from arq.worker import Function, Retry, RetryJob, Worker
from redis.exceptions import RedisError, ResponseError

from deltafan._background import background
from deltafan._keys import Keys
from deltafan._lua import load
from deltafan_worker._arq_job import UNRUNNABLE, ArqJob
from deltafan_worker._claim import Claim, Leave, claims_of
from deltafan_worker._interrupt import Reason
from deltafan_worker._lanes import Shares, Slots
from deltafan_worker._leaving import KEEP_FOR_EVER, Leaving
from deltafan_worker._limits import FleetLimits
from deltafan_worker._queue_pool import QueuePool, hear_a_ring, run_script
from deltafan_worker.serialization import deserialize, serialize

OnUnrun: TypeAlias = Callable[[Claim, Exception], Awaitable[None]]
"""Called with the claim of a job whose function can not be called, and why."""

log = logging.getLogger("deltafan.worker")

POLL_S = 1.0
"""How long a job of a producer that does not ring may wait to be noticed."""
BEAT_S = 1.0
"""Leases are renewed this often, or three times in their length; also how long an abort may wait to be noticed."""
BEAT_PORTION = 200
"""Leases per script call: half a millisecond of the server's time."""
CLAIMED_AT_ONCE = 8
"""What is claimed together begins together, and whoever is claimed next takes its steps between theirs: 64 batch jobs
that begin at once hold an interactive one up for a tenth of a second."""
_LAST_CLAIM_S = 1.0
"""A claim that is under way may bring jobs; a server that has fallen silent is not waited for."""
HAND_OVER_S = 10.0
"""How long the hand-over of the jobs left after draining may take."""
_RETRY_PAUSE_S = 0.2

_BEAT = load("beat", "deltafan_worker", using=())
_CLAIM = load("claim", "deltafan_worker", using=("limits",))


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """How a worker works."""

    name: str
    """Shown to people: in `started` events, usage records and presence keys."""
    queues: Sequence[str]
    """One, or two: the first one's jobs are urgent, the second one's take what is idle."""
    is_urgent: bool = True
    """Whether the first one's jobs are."""
    shares: Shares = field(default_factory=Shares)
    concurrency: int = 100
    lease_s: float = 8.0
    drain_timeout_s: float = 30.0
    burst: bool = False
    """Stop when nothing is due."""
    ledger_max_records: int = 1_000_000
    billed_ttl_ms: int = 50 * 3_600_000
    """How long the ledger remembers which calls of a job it has: at least from the first one's end until the sweeper no
    longer bills the job."""


class LeasedWorker(Worker):
    """Runs arq jobs under leases.

    A job's function finds its Claim in `ctx["claims"][ctx["job_id"]]`, whose `pending` may tell it to stop.
    """

    def __init__(
        self,
        functions: Sequence[Function],
        options: WorkerOptions,
        *,
        pool: QueuePool,
        keys: Keys,
        limits: FleetLimits | None = None,
        on_unrun: OnUnrun | None = None,
    ) -> None:
        super().__init__(
            functions,
            redis_pool=pool,
            queue_name=options.queues[0],
            max_jobs=options.concurrency,
            burst=options.burst,
            handle_signals=False,
            job_serializer=serialize,
            job_deserializer=deserialize,
        )
        self.name, self._queue = options.name, pool
        self.process = uuid4().hex[:12]
        self.claims: dict[str, Claim] = {}
        self._runs = self.ctx["claims"] = dict[str, Claim]()
        self._options, self._keys, self._on_unrun = options, keys, on_unrun
        self._leaving = Leaving(pool, keys, options.ledger_max_records, options.billed_ttl_ms)
        self._queues = tuple(options.queues)
        self._lease_ms = int(options.lease_s * 1000)
        self.limits = limits or FleetLimits(pool, keys, self._queues, reserve=options.shares.interactive)
        self._slots = Slots(len(self._queues), options.concurrency, options.shares)
        self._looked_at = set[int]()
        self._lease_lock = asyncio.Lock()
        self._slot_freed, self._draining, self._hurry = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._due_in_s = POLL_S
        self._unwell, self._cautious_until = False, 0.0

    @property
    def is_draining(self) -> bool:
        """Whether it has been told to stop."""
        return self._draining.is_set()

    def drain(self) -> None:
        """Stop claiming; `main` ends when the running jobs have ended or been handed over. A second call hurries."""
        if self._draining.is_set():
            self._hurry.set()
        self._draining.set()

    async def main(self) -> None:
        """Claim and run jobs until drained or, as a burst, until nothing is due."""
        async with background(self._keep_leases(), "deltafan-leases"):
            try:
                async with background(self._keep_claiming(), "deltafan-claims") as claiming:
                    await self.until_draining(claiming)
                    await asyncio.wait([claiming], timeout=_LAST_CLAIM_S)
            finally:
                await self._finish_running()

    async def until_draining(self, work: "asyncio.Task[Any]") -> None:
        """Return when it has been told to stop, or when `work` is done."""
        async with background(_wait(self._draining), "deltafan-draining") as draining:
            await asyncio.wait([work, draining], return_when=asyncio.FIRST_COMPLETED)

    async def close(self) -> None:
        """Called by arq's `run` when `main` is over. The pool belongs to whoever made it."""

    async def _keep_claiming(self) -> None:
        while not self._draining.is_set():
            is_idle = await self._turn()
            if self.burst and is_idle:
                break

    async def _turn(self) -> bool:
        """Claim what there is room for, else wait until there may be more. Returns whether there is nothing to do."""
        self._slot_freed.clear()
        was_idle = not self.tasks
        try:
            if await self._claim():
                return False
            self._is_well()
            is_idle = was_idle and not self.tasks
            if not (self.burst and is_idle):
                await self._doze()
        except (RedisError, OSError) as error:
            await self._wait_out(error)
            return False
        return is_idle

    async def _claim(self) -> bool:
        """Claim and launch jobs. Returns whether to claim again at once: more may be due that there is room for."""
        passes = self._slots.passes(self._running())
        self._looked_at = {index for index, _ in passes}
        if not passes:
            return False
        want = min(self.max_jobs - len(self.tasks), CLAIMED_AT_ONCE)
        urgent, cautious = int(self._options.is_urgent), self.loop.time() < self._cautious_until
        args = (*self.limits.common, self.process, self._lease_ms, want, int(cautious), urgent, *chain(*passes))
        due_in_ms, flat, left, second, limited = await run_script(self._queue, _CLAIM, self._queues, args)
        self._due_in_s = POLL_S if due_in_ms < 0 else min(POLL_S, due_in_ms / 1000)
        claimed = claims_of(flat, second=second, limited=bool(limited), process=self.process, queues=self._queues)
        for claim in claimed:
            self._launch(claim)
        self._slots.note(self._running(), left)
        return bool(claimed) and (any(left) or due_in_ms < 0)

    def _running(self) -> Counter[int]:
        return Counter(claim.queue_index for claim in self.claims.values())

    def _launch(self, claim: Claim) -> None:
        last = self.claims.get(claim.job_id)
        if last is not None and last.renewed:  # our own lease had run out, and nobody was faster
            last.token = claim.token
            return
        leaving = self.tasks.get(claim.job_id)
        self.claims[claim.job_id] = claim
        self.tasks[claim.job_id] = self.loop.create_task(self._run(claim, leaving), name=f"job-{claim.job_id}")

    async def _run(self, claim: Claim, leaving: "asyncio.Task[Any] | None") -> None:
        """Run a job; when it has just been given back and taken again, after that run's last step."""
        if leaving is not None:
            await asyncio.wait([leaving])
        self._runs[claim.job_id] = claim  # until then the last run's claim was
        if claim.pending is Reason.ABORTED:
            self.aborting_tasks.add(claim.job_id)
        if claim.pending is not None:
            self._interrupt(claim, claim.pending)
        try:
            await self.run_job(claim.job_id, int(float(claim.score)))
        except (RedisError, OSError) as error:
            log.warning(
                "job %s: the queue was lost (%s); it is run again when its lease has run out", claim.job_id, error
            )
        except Exception:
            log.exception("job %s: could not be run; it is tried again when its lease has run out", claim.job_id)
        finally:
            if self.claims[claim.job_id] is claim:
                del self.claims[claim.job_id], self.tasks[claim.job_id]
            del self._runs[claim.job_id]
            self.aborting_tasks.discard(claim.job_id)
            self._slot_freed.set()

    async def _doze(self) -> None:
        """Wait for the doorbell, a free slot, the next due job or the end."""
        waits: list[Awaitable[Any]] = [self._draining.wait()]
        # A slot that was freed under the claim may be one for a queue that it did not look at.
        wanted = self._looked_at & {index for index, _ in self._slots.passes(self._running())}
        listening = set() if self.burst else wanted
        if listening:
            doorbells = [self._keys.doorbell(self._queues[index - 1]) for index in sorted(listening)]
            waits.append(hear_a_ring(self._queue, doorbells, within_s=max(self._due_in_s, 0.01)))
        if len(listening) < len(self._queues):
            waits.append(self._slot_freed.wait())
        tasks = [asyncio.ensure_future(wait) for wait in waits]
        try:
            await asyncio.wait(tasks, timeout=2 * POLL_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for error in results:
            if isinstance(error, (RedisError, OSError)):
                raise error

    async def _wait_out(self, error: Exception) -> None:
        if not self._unwell:
            what = "refuses to give jobs out" if isinstance(error, ResponseError) else "is unreachable"
            log.warning("the queue's Redis %s (%s); waiting for it, running jobs go on", what, error)
        self._unwell = True
        while not self._draining.is_set():
            self._be_cautious()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._draining.wait(), _RETRY_PAUSE_S)
            with suppress(RedisError, OSError):
                # Leases that ran out meanwhile are renewed before anybody's job is claimed.
                await self._beat()
                await self.pool.ping()
                return

    def _be_cautious(self) -> None:
        """Leave jobs that were claimed before to their workers for a while, which come back from an outage as we do."""
        self._cautious_until = self.loop.time() + self._lease_ms / 2000

    def _is_well(self) -> None:
        if self._unwell:
            log.info("the queue's Redis is back")
        self._unwell = False

    async def _keep_leases(self) -> None:
        while True:
            await asyncio.sleep(min(BEAT_S, self._lease_ms / 3000))
            try:
                await self._beat()
            except (RedisError, OSError) as error:
                log.debug("heartbeat failed: %s", error)
                self._be_cautious()

    async def _beat(self) -> None:
        """Renew all leases; an answer that one is lost, or that an abort was asked for, interrupts that job."""
        async with self._lease_lock:
            held = [claim for claim in self.claims.values() if claim.renewed]
            for portion in (held[i : i + BEAT_PORTION] for i in range(0, len(held), BEAT_PORTION)):
                tokens = [claim.token for claim in portion]
                named = ((claim.token, claim.job_id, claim.queue_index) for claim in portion)
                args = [self._lease_ms, *chain.from_iterable(named)]
                # A connection that has gone silent must not cost the leases: the next beat takes another one.
                async with asyncio.timeout(self._lease_ms / 4000):
                    answers = await run_script(self._queue, _BEAT, self._queues, args, is_heartbeat=True)
                for claim, token, answer in zip(portion, tokens, answers, strict=True):
                    if claim.token == token:  # else it has been claimed again meanwhile, by ourselves
                        self._heed(claim, answer)

    def _heed(self, claim: Claim, answer: bytes) -> None:
        if answer == b"L":
            log.warning("job %s: another worker has claimed it; leaving it", claim.job_id)
            claim.renewed = False
            self._interrupt(claim, Reason.LEASE_LOST)
        elif answer == b"A" and claim.job_id not in self.aborting_tasks:
            self.aborting_tasks.add(claim.job_id)
            self._interrupt(claim, Reason.ABORTED)

    def _interrupt(self, claim: Claim, reason: Reason) -> None:
        claim.pending = reason
        # A function that is just about to start is let take its first step, where it says how it wants to be stopped.
        self.loop.call_soon(self._stop, claim, reason)

    def _stop(self, claim: Claim, reason: Reason) -> None:
        if claim.interrupt is not None:
            claim.interrupt(reason)
        elif self._runs.get(claim.job_id) is claim and (task := self.job_tasks.get(claim.job_id)) is not None:
            task.cancel()

    async def _finish_running(self) -> None:
        """Let the running jobs end, for a while; then hand over the rest."""
        if self.tasks and self._draining.is_set() and not self._hurry.is_set():
            timeout_s = self._options.drain_timeout_s
            hint = "a second signal hands them over at once"
            log.info("draining: waiting up to %g s for %d running jobs; %s", timeout_s, len(self.tasks), hint)
            timer = self.loop.call_later(timeout_s, self._hurry.set)
            hurry = asyncio.ensure_future(self._hurry.wait())
            try:
                while self.tasks and not hurry.done():
                    await asyncio.wait([*self.tasks.values(), hurry], return_when=asyncio.FIRST_COMPLETED)
            finally:
                hurry.cancel()
                timer.cancel()
        if self.tasks:
            log.info("handing over %d running jobs", len(self.tasks))
            for claim in tuple(self.claims.values()):
                self._interrupt(claim, Reason.HAND_OVER)
            await asyncio.wait(self.tasks.values(), timeout=HAND_OVER_S)
        for task in (late := tuple(self.tasks.values())):
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=1.0)

    async def run_job(self, job_id: str, score: int) -> None:  # noqa: ARG002  arq's signature
        """Call a claimed job's function, then leave the queue as that and the claim say."""
        claim = self._runs[job_id]
        job = ArqJob(claim)
        try:
            function = job.read(self.functions)
        except UNRUNNABLE as error:
            log.warning("job %s: %s", job_id, error if error.__cause__ is None else f"{error} ({error.__cause__})")
            if self._on_unrun is not None:
                await self._on_unrun(claim, error)
            self.jobs_failed += 1
            await self._leave(claim, job.result(error, success=False), int(self.keep_result_s * 1000))
            return
        try:
            outcome, success = await job.call(function, self.ctx, self.job_tasks), True
        except (Retry, RetryJob) as error:
            self.jobs_retried += 1
            await self._give_back(claim, getattr(error, "defer_score", None) or claim.release_delay_ms)
            return
        except asyncio.CancelledError as error:
            if job_id not in self.aborting_tasks:
                self.jobs_retried += 1
                await self._give_back(claim, claim.release_delay_ms)
                return
            outcome, success = error, False
        except Exception as error:
            log.exception("job %s: its function failed", job_id)
            outcome, success = error, False
        self.jobs_complete += success
        self.jobs_failed += not success
        keep_s = self.keep_result_s if function.keep_result_s is None else function.keep_result_s
        keep_ms = KEEP_FOR_EVER if function.keep_result_forever else int(keep_s * 1000)
        await self._leave(claim, job.result(outcome, success=success), keep_ms)

    async def _leave(self, claim: Claim, result: bytes | None, keep_result_ms: int) -> None:
        """Leave the queue as the claim says, through any outage."""
        if claim.leave is Leave.FINISH:
            await self._leaving.close(claim, result, keep_result_ms)
        else:
            await self._give_back(claim, claim.release_delay_ms)

    async def _give_back(self, claim: Claim, delay_ms: int) -> None:
        await self._stop_renewing(claim)
        if claim.leave is Leave.PARK and claim.lot is not None:
            await self.limits.park(
                claim.lot, claim.queue, token=claim.token, job_id=claim.job_id, score=claim.score, due_ms=claim.due_ms
            )
        else:
            await self._leaving.release(claim, delay_ms)

    async def _stop_renewing(self, claim: Claim) -> None:
        claim.renewed = False
        async with self._lease_lock:  # a heartbeat under way would take the lease again
            pass


async def _wait(event: asyncio.Event) -> None:
    await event.wait()
