"""Producer: submits prompt jobs and cancels them."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime, timedelta
from functools import partial
from itertools import islice
from secrets import token_hex
from typing import Any, Literal, Self

import orjson

from deltafan._batches import Batches
from deltafan._client import RedisClient
from deltafan._errors import InvalidRequest, JobNotFound
from deltafan._fold import Generation
from deltafan._keys import ARQ_JOB, Keys
from deltafan._limits import Limit, read_limits
from deltafan._lua import load
from deltafan._messages import next_turn
from deltafan._request import MAX_BODY_BYTES, check_job_id, check_reason
from deltafan._resp import pack
from deltafan._retention import Retention
from deltafan._submission import Job, Submitter, naming

CHUNK = 250
"""Jobs per round trip of submit_many: enough to hide the round trip, few enough to keep the server responsive."""

PORTIONS_UNDER_WAY = 2
CancelOutcome = Literal["cancelled", "requested", "ended"]
"""`cancelled`: it was waiting and has ended now. `requested`: its worker is told, it will not end completed.
`ended`: it had ended already."""


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
        max_queued: int | None = None,
    ) -> None:
        self._streams = streams
        self._queue = queue
        self._keys = keys
        self._retention = retention
        self._submitter = Submitter(
            streams, queue, keys=keys, retention=retention, max_body_bytes=max_body_bytes, max_queued=max_queued
        )
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
        open_client = partial(
            RedisClient,
            connect_timeout_s=connect_timeout_s,
            replicas=replicas,
            replicas_timeout_ms=replicas_timeout_ms,
        )
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

        Without a `job_id` it gets one that nobody had before. An error that leaves open whether the job was accepted
        has it in `job_ids`; with that id a repeat is the same job. Who may be cancelled himself had better choose one.

        `body` is the native request of `api` (temperature, tools …); `messages` is put into it where the API has them.
        A `deadline` given as timedelta counts from now; `ttl` (seconds or timedelta) is how long the result is kept,
        and its stream at most; `timeouts` (connect_s, first_delta_s, silence_s, total_s) bound this job's model calls;
        an answer that grows beyond `max_output_bytes` is cut, and the job fails with `output_too_long`. `metadata` is
        for operators, who find it in arq's record of the job.

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
        return await self._submit({name: value for name, value in fields.items() if value is not None})

    async def submit_many(self, requests: Iterable[Mapping[str, Any]]) -> list[Job]:
        """Submit jobs, each given as a mapping of `submit`'s arguments; answers in their order.

        One round trip for every few hundred jobs. All requests of such a portion are checked before any is sent.

        Raises:
            as `submit`. A wrong field is named as `requests[5].model`. The other jobs of its portion, those before and
            up to two portions behind it may have been submitted: `error.job_ids` has the ids of all that were sent, and
            submitting them again under these is safe.
        """
        ids: list[str] = []
        with naming(ids):
            return await self._submit_many(requests, ids)

    async def _submit_many(self, requests: Iterable[Mapping[str, Any]], ids: list[str]) -> list[Job]:
        jobs: list[Job] = []
        pending = enumerate(requests)
        sent: deque[asyncio.Task[list[Job]]] = deque()
        try:
            while portion := [self._submitter.check(one, f"requests[{n}].") for n, one in islice(pending, CHUNK)]:
                ids += [submission.id for submission in portion]
                sent.append(asyncio.create_task(self._submitter.send(portion)))
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
        child = await self._submit(fields | ({"deadline": deadline} if deadline is not None else {}))
        await self._streams.call("PUBLISH", keys.bell(parent), "")
        return child

    async def cancel(self, job_id: str, *, reason: str = "requested") -> CancelOutcome:
        """Ask for the job's end, wherever it is. Durable before it returns; repeating it is harmless.

        Raises:
            InvalidRequest: `reason` is no text.
            JobNotFound: nothing is known of the job.
            RedisUnavailable: the server can not be reached.
        """
        keys, retention = self._keys.job(check_job_id(job_id)), self._retention
        args = (check_reason(reason), retention.live_ms, *retention.ended_ms)
        (answer,) = await self._streams.run_durably(load("cancel"), [(keys, args)])
        if answer[0] == b"UNKNOWN" and await self._queue.call("EXISTS", ARQ_JOB + job_id):
            # Enqueued by arq's own client, and nobody has begun it: it has no state yet.
            (answer,) = await self._streams.run_durably(load("cancel"), [(keys, (*args, 1))])
        match answer[0]:
            case b"UNKNOWN":
                raise JobNotFound(job_id)
            case b"ENDED":
                return "ended"
        await self._streams.call("PUBLISH", self._keys.cancels, job_id)
        return "cancelled" if answer[0] == b"CANCELLED" else "requested"

    async def cancel_waiting(self, job_ids: Iterable[str], *, reason: str = "requested") -> list[str]:
        """End those of these jobs that no worker has ever begun, so that no model is called. Returns the ids of those.

        The others are left alone: what was begun, also when it waits again; what has ended; what nothing is known of,
        which is so of a job of arq's own client until a worker begins it (`cancel` ends that too).

        One round trip for every few hundred jobs. Repeating it is harmless, but what had ended by then is not among
        the ids: nor is a job of which this call was itself repeated, because the connection broke before the answer.

        Raises:
            InvalidRequest: an id or `reason` is not fit to be one.
            RedisUnavailable: the server can not be reached; some of them may have been cancelled.
        """
        args = (check_reason(reason), self._retention.live_ms, *self._retention.ended_ms, "", 1)
        ids, ended = iter([check_job_id(job_id) for job_id in job_ids]), list[str]()
        while portion := list(islice(ids, CHUNK)):
            calls = [(self._keys.job(job_id), args) for job_id in portion]
            answers = await self._streams.run_durably(load("cancel"), calls)
            ended += [job_id for job_id, answer in zip(portion, answers, strict=True) if answer[0] == b"CANCELLED"]
        return ended

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

    async def _submit(self, fields: Mapping[str, Any]) -> Job:
        submission = self._submitter.check(fields)
        with naming([submission.id]):
            (job,) = await self._submitter.send([submission])
        return job
