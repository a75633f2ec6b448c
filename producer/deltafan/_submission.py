"""Submissions: requests that have been checked, and their way into the servers.

A job is known by its state and run by arq's record of it. Both are written in one call; or, where the queue has a
server of its own, the state first, so that nobody can run what nobody knows.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import chain, groupby
from operator import attrgetter
from secrets import token_hex
from typing import Any, NamedTuple

import orjson

from deltafan._client import RedisClient, ScriptCall
from deltafan._errors import DeltafanError, InvalidRequest, JobConflict, QueueFull, RedisUnavailable
from deltafan._keys import ARQ_IN_PROGRESS, ARQ_JOB, ARQ_RESULT, FAIR_LANE, Keys
from deltafan._lua import load
from deltafan._messages import declares_tools
from deltafan._request import JobRequest, check_job_id, digest, inherited, job_record, parse_and_dump
from deltafan._resp import Argument, Reply, pack
from deltafan._retention import Retention

RINGS = 64
"""Jobs of a round trip that ring the doorbell; a woken worker takes as many jobs as it has room for."""

PER_CALL = 25
"""Jobs of one call of the script, which nothing can come between: on its way through what arrived of a pipeline the
server does about as many before it looks at others. Most of what a call of its own would take is not the job's."""
PER_CALL_BYTES = 64 * 1024
"""Of their records; a server holds a call as a whole."""

_HAS_RUN = 2
"""What withdraw answers."""


@dataclass(frozen=True, slots=True)
class Job:
    """A submitted job."""

    id: str
    created: bool
    """False when the id was known already: this submit was a repeat."""
    status: str
    """At the time of the submit."""


class Submission(NamedTuple):
    """A request that has been checked and written out, and the id that its job gets."""

    id: str
    lane: str
    tenant: str
    digest: str
    deadline_ms: int | None
    record: bytes
    """The job as arq stores it."""
    keeping: bytes | None
    """The command that keeps the request, of a job that may have a next turn."""

    def __repr__(self) -> str:
        # Without the record: prompts belong into no log.
        return f"Submission({self.id}, {self.lane}, {len(self.record)} bytes)"


class Submitter:
    """Checks and sends what a producer submits."""

    def __init__(
        self,
        streams: RedisClient,
        queue: RedisClient,
        *,
        keys: Keys,
        retention: Retention,
        max_body_bytes: int,
        max_queued: int | None,
    ) -> None:
        self._streams = streams
        self._queue = queue
        self._keys = keys
        self._retention = retention
        self._max_body_bytes = max_body_bytes
        self._max_queued = max_queued

    def check(self, fields: Mapping[str, Any], where: str = "") -> Submission:
        """A submission of `submit`'s arguments; `where` stands before the name of a field that is wrong.

        Raises:
            InvalidRequest: one is.
        """
        given = dict(fields)
        job_id = given.pop("job_id", None)
        try:
            if isinstance(given.get("deadline"), timedelta):
                given["deadline"] = _from_now(given["deadline"])
            request, data = parse_and_dump(given, max_body_bytes=self._max_body_bytes)
            id_ = token_hex(16) if job_id is None else check_job_id(job_id)
            record = job_record(request, now_ms=time.time_ns() // 1_000_000)
        except InvalidRequest as error:
            raise InvalidRequest(where + error.field, error.why) from None
        # Written out at once: what a portion has to keep is text, and the objects are gone before the next is checked.
        return Submission(
            id=id_,
            lane=request.lane,
            tenant=request.tenant or "",
            digest=digest(data),
            deadline_ms=request.deadline_ms,
            record=record,
            keeping=self._keep_request(id_, request) if declares_tools(request.api, request.body) else None,
        )

    async def send(self, submissions: Sequence[Submission]) -> list[Job]:
        """Make the jobs known and enqueue them, in as few round trips as there are servers.

        Raises:
            JobConflict, QueueFull, RedisUnavailable: as `Producer.submit`; the other jobs may have been accepted.
        """
        if keeping := [one.keeping for one in submissions if one.keeping is not None]:
            await self._streams.pipeline(keeping)
        script = load("submit", using=("common", "enqueue"))
        if self._streams is self._queue:
            replies = await self._queue.run_durably(script, self._calls_together(submissions))
            answers = list(chain.from_iterable(replies))
        else:
            ticket = "" if self._max_queued is None else token_hex(8)
            replies = await self._streams.run_durably(script, self._calls_of_state(submissions, ticket))
            answers = await self._enqueue(submissions, [answer for (answer,) in replies], ticket)
        return [self._job(submission, answer) for submission, answer in zip(submissions, answers, strict=True)]

    def _calls_together(self, submissions: Sequence[Submission]) -> list[ScriptCall]:
        """Each makes some jobs known and enqueues them."""
        limit = _or_empty(self._max_queued)
        calls, rings = list[ScriptCall](), RINGS
        for lane, group in _grouped(submissions):
            queue = self._keys.queue(lane)
            keys: list[str] = []
            args: list[Argument] = [
                self._retention.live_ms,
                "",
                limit,
                self._retention.queue_ms,
                rings,
                int(lane == FAIR_LANE),
            ]
            for one in group:
                job_id = one.id
                keys += self._keys.job(job_id)
                keys += (ARQ_JOB + job_id, ARQ_IN_PROGRESS + job_id, ARQ_RESULT + job_id)
                args += (one.digest, _or_empty(one.deadline_ms), job_id, one.record, one.tenant)
            calls.append(((*keys, queue, self._keys.doorbell(queue)), args))
            rings = max(0, rings - len(group))
        return calls

    def _calls_of_state(self, submissions: Sequence[Submission], ticket: str) -> list[ScriptCall]:
        """Each makes one job known: on a server of their own the keys of two jobs may lie in different slots."""
        shared = (self._retention.live_ms, ticket, "", "", 0, 0)
        return [(self._keys.job(one.id), (*shared, one.digest, _or_empty(one.deadline_ms))) for one in submissions]

    async def _enqueue(self, submissions: Sequence[Submission], answers: Sequence[Reply], ticket: str) -> list[Reply]:
        """The second write, where the queue has a server of its own; what that refuses is forgotten again."""
        open_ones = [pair for pair in zip(submissions, answers, strict=True) if _is_open(pair[1])]
        calls = []
        for index, (submission, answer) in enumerate(open_ones):
            keys, args = self._enqueue_call(submission, ring=index < RINGS)
            limit = _or_empty(self._max_queued) if answer[0] == b"NEW" else ""
            calls.append((keys, (*args, limit)))
        replies = await self._queue.run_durably(load("enqueue_only", using=("enqueue",)), calls)
        pairs = zip(open_ones, replies, strict=True)
        full = {submission.id: reply for (submission, _), reply in pairs if reply[0] == b"FULL"}
        withdrawals = [(self._keys.job(job_id), (ticket,)) for job_id in full]
        outcomes = await self._streams.run_many(load("withdraw"), withdrawals) if full else []
        refused = {job_id: full[job_id] for job_id, outcome in zip(full, outcomes, strict=True) if outcome != _HAS_RUN}
        return [refused.get(one.id, answer) for one, answer in zip(submissions, answers, strict=True)]

    def _keep_request(self, job_id: str, request: JobRequest) -> bytes:
        """As long as its result may be there; NX, since under an id that is taken this request is refused."""
        retention = self._retention.with_ttl(request.ttl)
        lifetime_ms = retention.live_ms + retention.state_ms
        return pack("SET", self._keys.request(job_id), orjson.dumps(inherited(request)), "NX", "PX", lifetime_ms)

    def _enqueue_call(self, submission: Submission, *, ring: bool) -> ScriptCall:
        job_id, queue = submission.id, self._keys.queue(submission.lane)
        keys = (ARQ_JOB + job_id, ARQ_IN_PROGRESS + job_id, ARQ_RESULT + job_id, queue, self._keys.doorbell(queue))
        fair = int(submission.lane == FAIR_LANE)
        return keys, (job_id, submission.record, self._retention.queue_ms, int(ring), fair, submission.tenant)

    def _job(self, submission: Submission, answer: Reply) -> Job:
        verdict, status = answer
        if verdict == b"CONFLICT":
            raise JobConflict(submission.id)
        if verdict == b"FULL":
            raise QueueFull(submission.id, submission.lane, status, self._max_queued or 0)
        return Job(submission.id, created=verdict == b"NEW", status=status.decode())


@contextmanager
def naming(ids: Sequence[str]) -> Iterator[None]:
    """Hand the ids of what was sent to whoever catches the error: without them a repeat would be other jobs."""
    try:
        yield
    except RedisUnavailable as error:
        again = f"job_id={ids[0]!r}" if len(ids) == 1 else "the ids in this error's job_ids"
        why = f"{error.why}; what was sent may have been accepted, submit it again with {again}"
        named = RedisUnavailable(error.url, why if ids else error.why)
        named.job_ids = tuple(ids)
        raise named from error
    except DeltafanError as error:
        error.job_ids = tuple(ids)
        raise


def _or_empty(number: int | None) -> int | str:
    return "" if number is None else number


def _grouped(submissions: Iterable[Submission]) -> Iterator[tuple[str, list[Submission]]]:
    """Submissions for one call each, in their order, with the lane of all of them."""
    for lane, run in groupby(submissions, attrgetter("lane")):
        group, size = list[Submission](), 0
        for one in run:
            if group and (len(group) == PER_CALL or size + len(one.record) > PER_CALL_BYTES):
                yield lane, group
                group, size = [], 0
            group.append(one)
            size += len(one.record)
        yield lane, group


def _from_now(deadline: timedelta) -> datetime:
    if deadline <= timedelta():
        raise InvalidRequest("deadline", "has passed; it counts from now")
    try:
        return datetime.now(UTC) + deadline
    except OverflowError:
        raise InvalidRequest("deadline", "is further ahead than a date can be") from None


def _is_open(answer: Reply) -> bool:
    return answer[0] != b"CONFLICT" and answer[1] in (b"queued", b"running")
