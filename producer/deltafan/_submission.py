"""Submissions: requests that have been checked, and their way into the servers.

A job is known by its state and run by arq's record of it. Both are written in one call; or, where the queue has a
server of its own, the state first, so that nobody can run what nobody knows.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from secrets import token_hex
from typing import Any

import orjson

from deltafan._client import RedisClient, ScriptCall
from deltafan._errors import DeltafanError, InvalidRequest, JobConflict, QueueFull, RedisUnavailable
from deltafan._keys import ARQ_IN_PROGRESS, ARQ_JOB, ARQ_RESULT, FAIR_LANE, Keys
from deltafan._lua import load
from deltafan._messages import declares_tools
from deltafan._request import JobRequest, check_job_id, inherited, job_record, parse_request
from deltafan._resp import Reply, pack
from deltafan._retention import Retention

RINGS = 64
"""Jobs of a round trip that ring the doorbell; a woken worker takes as many jobs as it has room for."""

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


@dataclass(frozen=True, slots=True)
class Submission:
    """A request that has been checked, and the id that its job gets."""

    id: str
    request: JobRequest
    now_ms: int


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
            request = parse_request(given, max_body_bytes=self._max_body_bytes)
            id_ = token_hex(16) if job_id is None else check_job_id(job_id)
        except InvalidRequest as error:
            raise InvalidRequest(where + error.field, error.why) from None
        return Submission(id_, request, time.time_ns() // 1_000_000)

    async def send(self, submissions: Sequence[Submission]) -> list[Job]:
        """Make the jobs known and enqueue them, in as few round trips as there are servers.

        Raises:
            JobConflict, QueueFull, RedisUnavailable: as `Producer.submit`; the other jobs may have been accepted.
        """
        together = self._streams is self._queue
        if kept := [
            self._keep_request(one) for one in submissions if declares_tools(one.request.api, one.request.body)
        ]:
            await self._streams.pipeline(kept)
        ticket = "" if together or self._max_queued is None else token_hex(8)
        calls = [
            self._submit_call(submission, ticket, ring=together and index < RINGS)
            for index, submission in enumerate(submissions)
        ]
        answers = await self._streams.run_durably(load("submit", using=("common", "enqueue")), calls)
        if not together:
            answers = await self._enqueue(submissions, answers, ticket)
        return [self._job(submission, answer) for submission, answer in zip(submissions, answers, strict=True)]

    def _submit_call(self, submission: Submission, ticket: str, *, ring: bool) -> ScriptCall:
        request, limit = submission.request, "" if self._max_queued is None else self._max_queued
        deadline = "" if request.deadline_ms is None else request.deadline_ms
        keys, args = self._keys.job(submission.id), (request.digest(), self._retention.live_ms, deadline, ticket, limit)
        if self._streams is not self._queue:
            return keys, args
        queue_keys, queue_args = self._enqueue_call(submission, ring=ring)
        return (*keys, *queue_keys), (*args, *queue_args)

    async def _enqueue(self, submissions: Sequence[Submission], answers: Sequence[Reply], ticket: str) -> list[Reply]:
        """The second write, where the queue has a server of its own; what that refuses is forgotten again."""
        open_ones = [pair for pair in zip(submissions, answers, strict=True) if _is_open(pair[1])]
        calls = []
        for index, (submission, answer) in enumerate(open_ones):
            keys, args = self._enqueue_call(submission, ring=index < RINGS)
            limit = self._max_queued if answer[0] == b"NEW" and self._max_queued is not None else ""
            calls.append((keys, (*args, limit)))
        replies = await self._queue.run_durably(load("enqueue_only", using=("enqueue",)), calls)
        pairs = zip(open_ones, replies, strict=True)
        full = {submission.id: reply for (submission, _), reply in pairs if reply[0] == b"FULL"}
        withdrawals = [(self._keys.job(job_id), (ticket,)) for job_id in full]
        outcomes = await self._streams.run_many(load("withdraw"), withdrawals) if full else []
        refused = {job_id: full[job_id] for job_id, outcome in zip(full, outcomes, strict=True) if outcome != _HAS_RUN}
        return [refused.get(one.id, answer) for one, answer in zip(submissions, answers, strict=True)]

    def _keep_request(self, submission: Submission) -> bytes:
        """As long as its result may be there; NX, since under an id that is taken this request is refused."""
        retention = self._retention.with_ttl(submission.request.ttl)
        lifetime_ms = retention.live_ms + retention.state_ms
        fields = inherited(submission.request)
        return pack("SET", self._keys.request(submission.id), orjson.dumps(fields), "NX", "PX", lifetime_ms)

    def _enqueue_call(self, submission: Submission, *, ring: bool) -> ScriptCall:
        job_id, queue = submission.id, self._keys.queue(submission.request.lane)
        keys = (ARQ_JOB + job_id, ARQ_IN_PROGRESS + job_id, ARQ_RESULT + job_id, queue, self._keys.doorbell(queue))
        record = job_record(submission.request, now_ms=submission.now_ms)
        fair, tenant = int(submission.request.lane == FAIR_LANE), submission.request.tenant or ""
        return keys, (job_id, record, self._retention.queue_ms, int(ring), fair, tenant)

    def _job(self, submission: Submission, answer: Reply) -> Job:
        verdict, status = answer
        if verdict == b"CONFLICT":
            raise JobConflict(submission.id)
        if verdict == b"FULL":
            raise QueueFull(submission.id, submission.request.lane, status, self._max_queued or 0)
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


def _from_now(deadline: timedelta) -> datetime:
    if deadline <= timedelta():
        raise InvalidRequest("deadline", "has passed; it counts from now")
    try:
        return datetime.now(UTC) + deadline
    except OverflowError:
        raise InvalidRequest("deadline", "is further ahead than a date can be") from None


def _is_open(answer: Reply) -> bool:
    return answer[0] != b"CONFLICT" and answer[1] in (b"queued", b"running")
