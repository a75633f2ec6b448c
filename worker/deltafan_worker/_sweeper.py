"""The sweeper: finds jobs that a crash between two systems left to nobody, and gives them back or ends them.

A submit writes state, then the queue; a worker writes the job's end, then ledger and queue; the queue's server may come
back empty. Whoever dies in between leaves a job that neither side would ever touch again. Every worker process has a
sweeper; a lock lets one of them look, since all looking at once would be safe but wasteful.

A job is only repaired when two passes in a row have found it without queue entry and lease, and when its state was
touched by nobody in between: whoever runs a job renews its lifetime each second. Each repair is one script that checks
again what it relies on, so a sweeper may die anywhere: the next pass finds the job repaired, or as it was.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import orjson

from deltafan._client import RedisClient
from deltafan._errors import DeltafanError
from deltafan._events import TERMINAL_TYPES
from deltafan._keys import ARQ_IN_PROGRESS, ARQ_JOB, ARQ_RESULT, FAIR_LANE, LANES, Keys
from deltafan._lua import load
from deltafan._request import JobRequest, digest, job_record, parse_and_dump
from deltafan._resp import Reply
from deltafan._retention import Retention

log = logging.getLogger("deltafan.sweeper")

PAGE = 100
"""Keys per SCAN step, and at most about as many scripts in one round trip: a few ms of the server's time."""
REST = 10
"""A step is followed by a pause of so many times what it took: a pass may take long, but no more than a tenth of a
server's time."""
MAX_SUSPECTS = 10_000
"""Kept from one pass to the next; what is beyond is found again later."""
_MOVED_MS = 100
"""A state's expiry is read from two clocks of one server, which may differ by a few ms."""

_LOST = "the queue knows nothing of this job any more, and nobody runs it"
_ADVICE = "submit it again under another id"


@dataclass(frozen=True, slots=True, kw_only=True)
class SweeperOptions:
    """Whom a sweeper serves, and how often it looks."""

    name: str
    redis_url: str
    streams_url: str
    keys: Keys
    retention: Retention
    interval_s: float = 60.0
    ledger_max_records: int = 1_000_000
    billed_ttl_ms: int


@dataclass(frozen=True, slots=True)
class _Sight:
    """A job as one pass has seen it."""

    id: str
    status: str
    now_ms: int
    expiry_ms: int
    ended_ms: int
    deadline_ms: int | None
    digest: str
    runs: int
    calls: tuple[str, ...]
    where: str = ""
    unbilled: tuple[str, ...] = field(default=())

    @property
    def has_ended(self) -> bool:
        return self.status in TERMINAL_TYPES or self.status == "expired"

    @property
    def is_late(self) -> bool:
        """Whether its deadline has passed while it waited; a job that runs is stopped by its worker."""
        return self.status == "queued" and self.deadline_ms is not None and self.deadline_ms < self.now_ms

    @property
    def is_orphan(self) -> bool:
        """Whether no worker will ever come to it by itself, and somebody should."""
        return self.where != "HELD" and (not self.has_ended or self.where == "RECORD" or bool(self.unbilled))


class Sweeper:
    """Looks through all jobs of a prefix, pass after pass."""

    def __init__(self, options: SweeperOptions) -> None:
        self._options = options
        self._keys = options.keys
        self._suspects: dict[str, int] = {}
        self._queue: RedisClient
        self._streams: RedisClient

    async def run(self) -> None:
        """Make a pass every interval, if no other sweeper does; runs until cancelled."""
        while True:
            await asyncio.sleep(self._options.interval_s)
            try:
                await self.sweep()
            except DeltafanError as error:
                log.debug("the sweep was left: %s", error)
            except Exception:
                log.exception("the sweep broke; it is tried again in %g s", self._options.interval_s)

    async def sweep(self) -> bool:
        """Make one pass. Returns False when another process holds the lock.

        Raises:
            RedisUnavailable: a server went away; what was found before stands.
        """
        options = self._options
        async with AsyncExitStack() as stack:
            self._queue = self._streams = await stack.enter_async_context(RedisClient(options.redis_url))
            if options.streams_url != options.redis_url:
                self._streams = await stack.enter_async_context(RedisClient(options.streams_url))
            if not await self._hold_lock():
                self._suspects = {}
                return False
            await self._pass()
        return True

    async def _pass(self) -> None:
        suspects: dict[str, int] = {}
        clock = asyncio.get_running_loop().time
        began = clock()
        async for job_ids in self._job_ids():
            for job in await self._look(job_ids):
                if job.is_late:
                    await self._give_up(job, "deadline_exceeded", "the job's deadline has passed", retryable=False)
                elif job.is_orphan and not await self._repaired(job) and len(suspects) < MAX_SUSPECTS:
                    suspects[job.id] = job.expiry_ms
            await asyncio.sleep((clock() - began) * REST)
            if not await self._hold_lock():
                break
            began = clock()
        self._suspects = suspects

    async def _hold_lock(self) -> bool:
        """Only saves work, so it may be lost at any moment. Whoever has it keeps it, and with it the suspects."""
        me, key, ttl_ms = self._options.name.encode(), self._keys.sweeper, int(self._options.interval_s * 3000)
        await self._queue.call("SET", key, me, "NX", "PX", ttl_ms)
        if await self._queue.call("GET", key) != me:
            return False
        await self._queue.call("PEXPIRE", key, ttl_ms)
        return True

    async def _job_ids(self) -> AsyncIterator[list[str]]:
        """The ids of all jobs that have a state, some of them perhaps twice; page by page, as the server has looked.

        Among many other keys most pages are empty, and have cost the server as much.
        """
        start, end = (part.encode() for part in self._keys.state("\0").split("\0"))
        cursor = b"0"
        while True:
            cursor, keys = await self._streams.call("SCAN", cursor, "MATCH", start + b"*" + end, "COUNT", PAGE)
            yield [key[len(start) : -len(end)].decode() for key in keys]
            if cursor == b"0":
                return

    async def _look(self, job_ids: Sequence[str]) -> list[_Sight]:
        if not job_ids:
            return []
        calls = [(self._keys.job(job_id), ()) for job_id in job_ids]
        replies = await self._streams.run_many(load("look", "deltafan_worker"), calls)
        jobs = [_sight(job_id, reply) for job_id, reply in zip(job_ids, replies, strict=True) if reply is not None]
        if not jobs:
            return []
        traces = [(self._trace_keys(job.id), (job.id, *job.calls)) for job in jobs]
        found = await self._queue.run_many(load("trace", "deltafan_worker", using=()), traces)
        return [_traced(job, reply, self._options.retention) for job, reply in zip(jobs, found, strict=True)]

    def _trace_keys(self, job_id: str) -> tuple[str, ...]:
        queues = (self._keys.queue(lane) for lane in LANES)
        return (ARQ_JOB + job_id, ARQ_IN_PROGRESS + job_id, self._keys.billed(job_id), *queues)

    async def _repaired(self, job: _Sight) -> bool:
        """Do what can be done, once the job has been an orphan for a whole interval."""
        seen = self._suspects.get(job.id)
        if seen is None or abs(seen - job.expiry_ms) > _MOVED_MS:
            return False
        if job.where == "RECORD":
            await self._requeue(job)
        elif job.has_ended:
            await self._bill(job)
        elif (request := await self._known_request(job)) is not None:
            await self._enqueue(job, request)
        else:
            code = "lost_before_run" if job.runs == 0 else "lost_in_run"
            await self._give_up(job, code, f"{_LOST}; {_ADVICE}", retryable=True)
        return True

    async def _requeue(self, job: _Sight) -> None:
        """The record is there, the entry is not: whoever claims it runs it or, if it has ended, only closes it."""
        record = await self._queue.call("GET", ARQ_JOB + job.id)
        queue = self._keys.queue(_lane(record))
        keys = (queue, ARQ_JOB + job.id, ARQ_IN_PROGRESS + job.id, self._keys.doorbell(queue))
        if await self._queue.run(load("requeue", "deltafan_worker", using=()), keys, (job.id,)):
            log.warning("job %s: its queue entry was lost; it is in the queue again", job.id)

    async def _bill(self, job: _Sight) -> None:
        """It has ended, and the queue has forgotten it before the ledger knew."""
        notes = await self._streams.call("HMGET", self._keys.state(job.id), *[f"u:{call}" for call in job.unbilled])
        pairs = zip(job.unbilled, notes, strict=True)
        records = [part for call, note in pairs if note is not None for part in (call, note)]
        if not records:
            return
        keys = (self._keys.queue(LANES[0]), self._keys.usage, self._keys.billed(job.id))
        # No token is empty, so arq's side is left alone.
        args = ("", job.id, "", 0, self._options.billed_ttl_ms, self._options.ledger_max_records, *records)
        await self._queue.run(load("close", "deltafan_worker", using=()), keys, args)
        log.warning("job %s: its bill was lost on the way to the ledger; it is written", job.id)

    async def _known_request(self, job: _Sight) -> JobRequest | None:
        """What the job asked for; outside the queue that is kept only of jobs that may call tools."""
        stored = await self._streams.call("GET", self._keys.request(job.id))
        if stored is None:
            return None
        try:
            deadline = None if job.deadline_ms is None else datetime.fromtimestamp(job.deadline_ms / 1000, UTC)
            request, data = parse_and_dump({**orjson.loads(stored), "deadline": deadline})
        except (ValueError, DeltafanError):
            return None
        # Under an id that is taken a refused submit may have left its own.
        return request if digest(data) == job.digest else None

    async def _enqueue(self, job: _Sight, request: JobRequest) -> None:
        queue, retention = self._keys.queue(request.lane), self._options.retention
        names = (ARQ_JOB + job.id, ARQ_IN_PROGRESS + job.id, ARQ_RESULT + job.id, queue, self._keys.doorbell(queue))
        fair = int(request.lane == FAIR_LANE)
        args = (job.id, job_record(request, now_ms=job.now_ms), retention.queue_ms, 1, fair, request.tenant or "", "")
        await self._queue.run(load("enqueue_only", using=("enqueue",)), names, args)
        log.warning("job %s: the queue had lost it; it is submitted again from the request that was kept", job.id)

    async def _give_up(self, job: _Sight, code: str, message: str, *, retryable: bool) -> None:
        untouched = "" if job.is_late else job.expiry_ms
        args = (code, message, int(retryable), job.status, untouched, *self._options.retention.ended_ms)
        if await self._streams.run(load("give_up", "deltafan_worker"), self._keys.job(job.id), args):
            log.warning("job %s: ended by the sweeper as %s: %s", job.id, code, message)


def _sight(job_id: str, reply: Reply) -> _Sight:
    status, now, expiry, ended, deadline, digest, runs, *calls = (part.decode() for part in reply)
    return _Sight(
        job_id,
        status,
        int(now),
        int(expiry),
        int(ended or 0),
        int(deadline) if deadline else None,
        digest,
        int(runs),
        tuple(calls),
    )


def _traced(job: _Sight, reply: Reply, retention: Retention) -> _Sight:
    """The ledger forgets which calls it has some time after the end; what is older than that is not billed again."""
    where, unbilled = reply
    is_fresh = job.has_ended and job.now_ms < job.ended_ms + retention.state_ms
    missing = tuple(call.decode() for call in unbilled) if is_fresh else ()
    return replace(job, where=where.decode(), unbilled=missing)


def _lane(record: bytes | None) -> str:
    try:
        lane = orjson.loads(record or b"{}")["k"]["lane"]
    except (ValueError, KeyError, TypeError):
        return LANES[0]
    return lane if lane in LANES else LANES[0]
