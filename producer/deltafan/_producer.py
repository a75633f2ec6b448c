"""Producer: submits prompt jobs and cancels them."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import islice
from secrets import token_hex
from typing import Any, Literal, Self

import orjson

from deltafan._batches import Batches
from deltafan._client import RedisClient, ScriptCall
from deltafan._errors import InvalidRequest, JobConflict, JobNotFound, QueueFull, RedisUnavailable
from deltafan._fold import Generation
from deltafan._keys import ARQ_IN_PROGRESS, ARQ_JOB, ARQ_RESULT, FAIR_LANE, Keys
from deltafan._limits import Limit, read_limits
from deltafan._lua import Script, load
from deltafan._messages import declares_tools, next_turn
from deltafan._request import MAX_BODY_BYTES, JobRequest, check_job_id, inherited, job_record, parse_request
from deltafan._resp import Reply, pack
from deltafan._retention import Retention
from deltafan._url import masked_url

CHUNK = 250
"""Jobs per round trip of submit_many: enough to hide the round trip, few enough to keep the server responsive."""

PORTIONS_UNDER_WAY = 2
RINGS = 64
"""Jobs of a round trip that ring the doorbell; a woken worker takes as many jobs as it has room for."""

CancelOutcome = Literal["cancelled", "requested", "ended"]
"""`cancelled`: it was waiting and has ended now. `requested`: its worker is told, it will not end completed.
`ended`: it had ended already."""


@dataclass(frozen=True, slots=True)
class Job:
    """A submitted job."""

    id: str
    created: bool
    """False when the id was known already: this submit was a repeat."""
    status: str
    """At the time of the submit."""


@dataclass(frozen=True, slots=True)
class _Submission:
    id: str
    request: JobRequest
    now_ms: int


class Producer:
    """Submits jobs. One instance serves a whole process; its calls may run concurrently.

    Open it with `async with Producer.connect(url) as producer`.
    """

    def __init__(
        self,
        streams: RedisClient,
        queue: RedisClient,
        *,
        keys: Keys,
        retention: Retention,
        max_body_bytes: int,
        replicas: int,
        replicas_timeout_ms: int,
        max_queued: int | None = None,
    ) -> None:
        self._streams = streams
        self._queue = queue
        self._keys = keys
        self._retention = retention
        self._max_body_bytes = max_body_bytes
        self._replicas = replicas
        self._replicas_timeout_ms = replicas_timeout_ms
        self._max_queued = max_queued
        self._batches = Batches(queue, keys, retention)

    @classmethod
    @asynccontextmanager
    async def connect(
        cls,
        redis_url: str = "redis://localhost:6379/0",
        *,
        streams_url: str | None = None,
        prefix: str = "deltafan",
        retention: Retention | None = None,
        max_body_bytes: int = MAX_BODY_BYTES,
        replicas: int = 0,
        replicas_timeout_ms: int = 500,
        max_queued: int | None = None,
        connect_timeout_s: float = 1.0,
    ) -> AsyncIterator[Self]:
        """Connect to the queue's server and, where it is another, to the streams' server.

        `replicas`: how many replicas must have a submit or a cancel, within `replicas_timeout_ms`, before it is
        acknowledged. `max_queued`: a new job is refused while so many wait in its lane for a worker.

        Raises:
            RedisUnavailable: no server answers within `connect_timeout_s`.
        """
        open_client = partial(RedisClient, connect_timeout_s=connect_timeout_s, waits_s=replicas_timeout_ms / 1000)
        async with AsyncExitStack() as stack:
            queue = streams = await stack.enter_async_context(open_client(redis_url))
            if streams_url is not None and streams_url != redis_url:
                streams = await stack.enter_async_context(open_client(streams_url))
            yield cls(
                streams,
                queue,
                keys=Keys(prefix),
                retention=retention or Retention(),
                max_body_bytes=max_body_bytes,
                replicas=replicas,
                replicas_timeout_ms=replicas_timeout_ms,
                max_queued=max_queued,
            )

    async def submit(
        self,
        *,
        model: str,
        messages: Sequence[Mapping[str, Any]] | None = None,
        body: Mapping[str, Any] | None = None,
        api: str = "chat",
        job_id: str | None = None,
        lane: str = "interactive",
        tenant: str | None = None,
        metadata: Mapping[str, str] | None = None,
        deadline: datetime | timedelta | None = None,
        on_interrupt: str = "restart",
        ttl: timedelta | float | None = None,
        timeouts: Mapping[str, float] | None = None,
        max_output_bytes: int | None = None,
    ) -> Job:
        """Submit one job. One round trip, and safe to repeat with the same `job_id`: the job runs once.

        `body` is the native request of `api` (temperature, tools …); `messages` is put into it where the API has them.
        A `deadline` given as timedelta counts from now; `ttl` (seconds or timedelta) is how long stream and result are
        kept; `timeouts` (connect_s, first_delta_s, silence_s, total_s) bound this job's model calls;
        an answer that grows beyond `max_output_bytes` is cut, and the job fails with `output_too_long`.

        Raises:
            InvalidRequest: a field is wrong; nothing was sent.
            JobConflict: `job_id` belongs to another request.
            QueueFull: `max_queued` jobs wait already; a job that was submitted before is never refused.
            RedisUnavailable: the server can not be reached, or is out of memory.
        """
        fields = {
            "model": model,
            "messages": messages,
            "body": body,
            "api": api,
            "job_id": job_id,
            "lane": lane,
            "tenant": tenant,
            "metadata": metadata,
            "deadline": deadline,
            "on_interrupt": on_interrupt,
            "ttl": ttl,
            "timeouts": timeouts,
            "max_output_bytes": max_output_bytes,
        }
        jobs = await self.submit_many([{name: value for name, value in fields.items() if value is not None}])
        return jobs[0]

    async def submit_many(self, requests: Iterable[Mapping[str, Any]]) -> list[Job]:
        """Submit jobs, each given as a mapping of `submit`'s arguments; answers in their order.

        One round trip for every few hundred jobs. All requests of such a portion are checked before any is sent.

        Raises:
            as `submit`; portions before the one that failed have been submitted, of a full queue's those that found
            room, and submitting all again is safe where the requests have ids of their own.
        """
        jobs: list[Job] = []
        pending = iter(requests)
        sent: deque[asyncio.Task[list[Job]]] = deque()
        try:
            while portion := [self._check(fields) for fields in islice(pending, CHUNK)]:
                sent.append(asyncio.create_task(self._send(portion)))
                # Let it be written, so that the server works on it while the next portion is checked.
                await asyncio.sleep(0)
                if len(sent) > PORTIONS_UNDER_WAY:
                    jobs += await sent.popleft()
            while sent:
                jobs += await sent.popleft()
        except Exception:
            # What is under way is not torn apart: it could fall between the two writes of a submit.
            await asyncio.gather(*sent, return_exceptions=True)
            raise
        finally:
            for task in sent:
                task.cancel()
        return jobs

    async def submit_tool_results(
        self,
        job: Job | str,
        results: Mapping[str, Any],
        *,
        body: Mapping[str, Any] | None = None,
        deadline: datetime | timedelta | None = None,
    ) -> Job:
        """Answer the tool calls that a job ended with: the next turn of its conversation, as a job of its own.

        `results` has a text, or something that JSON can hold, for the id of each call. Model, API, body and options
        are those of the job; `body` changes single fields of it. Repeating the call gives the same job.

        Raises:
            InvalidRequest: the job has not ended, called no tool, or the results do not match its calls.
            JobConflict: its calls have been answered otherwise.
            JobNotFound: nothing is known of the job, or its request has expired.
            RedisUnavailable: the server can not be reached.
        """
        parent = check_job_id(job if isinstance(job, str) else job.id)
        keys = self._keys
        stored, result = await self._streams.pipeline(
            [pack("GET", keys.request(parent)), pack("GET", keys.result(parent))]
        )
        if stored is None:
            raise JobNotFound(parent)
        if result is None:
            raise InvalidRequest("job", f"{parent} has not ended; wait for its result, then answer its calls")
        fields = orjson.loads(stored)
        generation = Generation.from_json(orjson.loads(result))
        fields["body"] = next_turn(fields["api"], fields["body"], generation, results, body or {})
        answer = await self._streams.run(load("link"), keys.job(parent), (token_hex(16),))
        if answer is None:
            raise JobNotFound(parent)
        fields |= {"job_id": answer.decode(), "parent": parent}
        (child,) = await self.submit_many([fields | ({"deadline": deadline} if deadline is not None else {})])
        await self._streams.call("PUBLISH", keys.bell(parent), "")
        return child

    async def cancel(self, job_id: str, *, reason: str = "requested") -> CancelOutcome:
        """Ask for the job's end, wherever it is. Durable before it returns; repeating it is harmless.

        Raises:
            JobNotFound: nothing is known of the job.
            RedisUnavailable: the server can not be reached.
        """
        check_job_id(job_id)
        retention = self._retention
        args = (reason[:512], retention.live_ms, *retention.ended_ms)
        (answer,) = await self._run_durably(self._streams, load("cancel"), [(self._keys.job(job_id), args)])
        match answer[0]:
            case b"UNKNOWN":
                raise JobNotFound(job_id)
            case b"ENDED":
                return "ended"
        await self._streams.call("PUBLISH", self._keys.cancels, job_id)
        return "cancelled" if answer[0] == b"CANCELLED" else "requested"

    async def report_batch(self, batch_id: str, progress: Mapping[str, Any], *, is_first: bool = False) -> bool:
        """Let other machines see how far a batch is (`batches`). Returns whether its end was asked for.

        A run's first report forgets what was asked of earlier ones. `progress["status"]` is `running` until the last.
        """
        return await self._batches.report(check_job_id(batch_id, "batch_id"), progress, is_first=is_first)

    async def cancel_batch(self, batch_id: str) -> float:
        """Ask for a batch's end: its runner submits no more, and cancels what is in flight.

        Should the runner be dead, workers cancel the jobs that wait when their turn comes, as long as their metadata
        names the batch; those that run come to their end. Returns how many seconds ago the runner was last heard of.

        Raises:
            JobNotFound: nothing is known of the batch.
            InvalidRequest: it has ended.
        """
        return await self._batches.cancel(check_job_id(batch_id, "batch_id"))

    async def batches(self) -> dict[str, dict[str, str]]:
        """What is known of each batch, the one last heard of first."""
        return await self._batches.all()

    async def limits(self) -> list[Limit]:
        """What the fleet keeps of its providers' limits, and who waits for them.

        Raises:
            RedisUnavailable: the server can not be reached.
        """
        return await read_limits(self._queue, self._keys)

    def _check(self, fields: Mapping[str, Any]) -> _Submission:
        given = dict(fields)
        job_id = given.pop("job_id", None)
        if isinstance(given.get("deadline"), timedelta):
            given["deadline"] = datetime.now(UTC) + given["deadline"]
        request = parse_request(given, max_body_bytes=self._max_body_bytes)
        return _Submission(
            check_job_id(job_id) if job_id is not None else token_hex(16), request, time.time_ns() // 1_000_000
        )

    async def _send(self, submissions: Sequence[_Submission]) -> list[Job]:
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
        answers = await self._run_durably(self._streams, load("submit", using=("common", "enqueue")), calls)
        if not together:
            answers = await self._enqueue(submissions, answers, ticket)
        return [self._job(submission, answer) for submission, answer in zip(submissions, answers, strict=True)]

    def _submit_call(self, submission: _Submission, ticket: str, *, ring: bool) -> ScriptCall:
        request, limit = submission.request, "" if self._max_queued is None else self._max_queued
        deadline = "" if request.deadline_ms is None else request.deadline_ms
        keys, args = self._keys.job(submission.id), (request.digest(), self._retention.live_ms, deadline, ticket, limit)
        if self._streams is not self._queue:
            return keys, args
        queue_keys, queue_args = self._enqueue_call(submission, ring=ring)
        return (*keys, *queue_keys), (*args, *queue_args)

    async def _enqueue(self, submissions: Sequence[_Submission], answers: Sequence[Reply], ticket: str) -> list[Reply]:
        """The second write, where the queue has a server of its own; what that refuses is forgotten again."""
        open_ones = [pair for pair in zip(submissions, answers, strict=True) if _is_open(pair[1])]
        calls = []
        for index, (submission, answer) in enumerate(open_ones):
            keys, args = self._enqueue_call(submission, ring=index < RINGS)
            limit = self._max_queued if answer[0] == b"NEW" and self._max_queued is not None else ""
            calls.append((keys, (*args, limit)))
        replies = await self._run_durably(self._queue, load("enqueue_only", using=("enqueue",)), calls)
        pairs = zip(open_ones, replies, strict=True)
        refused = {submission.id: reply for (submission, _), reply in pairs if reply[0] == b"FULL"}
        if refused:
            withdrawals = [(self._keys.job(job_id), (ticket,)) for job_id in refused]
            await self._streams.run_many(load("withdraw"), withdrawals)
        return [refused.get(one.id, answer) for one, answer in zip(submissions, answers, strict=True)]

    def _keep_request(self, submission: _Submission) -> bytes:
        """As long as its result may be there; NX, since under an id that is taken this request is refused."""
        retention = self._retention.with_ttl(submission.request.ttl)
        lifetime_ms = retention.live_ms + retention.state_ms
        fields = inherited(submission.request)
        return pack("SET", self._keys.request(submission.id), orjson.dumps(fields), "NX", "PX", lifetime_ms)

    def _enqueue_call(self, submission: _Submission, *, ring: bool) -> ScriptCall:
        job_id, queue = submission.id, self._keys.queue(submission.request.lane)
        keys = (ARQ_JOB + job_id, ARQ_IN_PROGRESS + job_id, ARQ_RESULT + job_id, queue, self._keys.doorbell(queue))
        record = job_record(submission.request, now_ms=submission.now_ms)
        fair, tenant = int(submission.request.lane == FAIR_LANE), submission.request.tenant or ""
        return keys, (job_id, record, self._retention.queue_ms, int(ring), fair, tenant)

    def _job(self, submission: _Submission, answer: Reply) -> Job:
        verdict, status = answer
        if verdict == b"CONFLICT":
            raise JobConflict(submission.id)
        if verdict == b"FULL":
            raise QueueFull(submission.id, submission.request.lane, status, self._max_queued or 0)
        return Job(submission.id, created=verdict == b"NEW", status=status.decode())

    async def _run_durably(self, client: RedisClient, script: Script, calls: Sequence[ScriptCall]) -> list[Reply]:
        """Run a script for each call, and on the same connection wait until the replicas have what it wrote."""
        if self._replicas == 0 or not calls:
            return await client.run_many(script, calls) if calls else []
        wait = pack("WAIT", self._replicas, self._replicas_timeout_ms)
        *answers, heard = await client.run_many(script, calls, wait)
        if heard < self._replicas:
            within = f"within {self._replicas_timeout_ms} ms"
            why = f"only {heard} of {self._replicas} replicas had the write {within}; repeat the call"
            raise RedisUnavailable(masked_url(client.url), why)
        return answers


def _is_open(answer: Reply) -> bool:
    return answer[0] != b"CONFLICT" and answer[1] in (b"queued", b"running")
