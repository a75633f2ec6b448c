"""LeasedWorker with functions of others: what arq's own worker does for them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from functools import partial
from typing import Any, TypeAlias, cast

import pytest
from arq.jobs import Job, JobStatus
from arq.worker import JobExecutionFailed, Retry, RetryJob, func
from redis.asyncio import Redis

from deltafan._background import background
from deltafan._keys import Keys
from deltafan_worker._leased import LeasedWorker, WorkerOptions
from deltafan_worker._queue_pool import QueuePool, queue_pool
from deltafan_worker.serialization import deserialize
from support.waiting import wait_until

QUEUE = "deltafan:queue:interactive"
Coroutine: TypeAlias = Callable[..., Awaitable[Any]]


@pytest.fixture
async def arq(redis_url: str) -> AsyncIterator[QueuePool]:
    async with queue_pool(redis_url) as pool:
        yield pool


async def enqueued(arq: QueuePool, function: str = "f", *args: Any, **options: Any) -> Job:
    job = await arq.enqueue_job(function, *args, _queue_name=QUEUE, **options)
    assert job is not None
    return job


@asynccontextmanager
async def worker_of(arq: QueuePool, coroutine: Coroutine, **options: Any) -> AsyncIterator[LeasedWorker]:
    """A worker that knows it as `f`."""
    function = func(cast(Any, coroutine), name="f", **options)
    worker = LeasedWorker([function], WorkerOptions(name="w", queues=[QUEUE], lease_s=3.0), pool=arq, keys=Keys("p"))
    async with background(worker.main(), "worker") as main:
        yield worker
        worker.drain()
        worker.drain()
        await asyncio.wait_for(main, 20)


async def outcome(job: Job) -> Any:
    return await job.result(timeout=5, poll_delay=0.01)


async def test_a_function_has_arguments_a_context_and_a_result(arq: QueuePool) -> None:
    async def f(ctx: dict[Any, Any], left: int, *, right: int) -> dict[str, Any]:
        return {"sum": left + right, "id": ctx["job_id"], "try": ctx["job_try"], "at": ctx["enqueue_time"].isoformat()}

    job = await enqueued(arq, "f", 1, right=2)
    async with worker_of(arq, f):
        result = await outcome(job)
    info = await job.result_info()
    assert info is not None
    assert result == {"sum": 3, "id": job.job_id, "try": 1, "at": info.enqueue_time.isoformat()}
    assert (info.function, info.success, info.job_try, info.queue_name) == ("f", True, 1, QUEUE)
    assert info.enqueue_time <= info.start_time <= info.finish_time


async def test_a_retry_runs_again_after_its_delay(arq: QueuePool) -> None:
    tries: list[tuple[int, float]] = []

    async def f(ctx: dict[Any, Any]) -> str:
        tries.append((ctx["job_try"], asyncio.get_running_loop().time()))
        if len(tries) == 1:
            raise Retry(timedelta(seconds=0.3))
        if len(tries) == 2:
            raise RetryJob
        return "at last"

    job = await enqueued(arq, _job_try=5)
    async with worker_of(arq, f):
        assert await outcome(job) == "at last"
    assert [number for number, _ in tries] == [5, 6, 7]
    assert tries[1][1] - tries[0][1] >= 0.29


async def test_an_error_is_the_result_and_in_the_log(arq: QueuePool, caplog: pytest.LogCaptureFixture) -> None:
    async def f(_ctx: dict[Any, Any]) -> None:
        raise ValueError("the reason")

    job = await enqueued(arq)
    async with worker_of(arq, f):
        with pytest.raises(JobExecutionFailed, match="the reason"):
            await outcome(job)
    assert f"job {job.job_id}: its function failed" in caplog.text


async def test_a_function_has_the_time_that_it_asks_for(arq: QueuePool) -> None:
    async def f(_ctx: dict[Any, Any]) -> None:
        await asyncio.Event().wait()

    job = await enqueued(arq)
    async with worker_of(arq, f, timeout=0.05):
        with pytest.raises(JobExecutionFailed):
            await outcome(job)


@pytest.mark.parametrize("moment", ["waiting", "running"])
async def test_an_abort_cancels_the_function(arq: QueuePool, redis: Redis, moment: str) -> None:
    running = asyncio.Event()

    async def f(_ctx: dict[Any, Any]) -> None:
        running.set()
        await asyncio.Event().wait()

    job = Job((await enqueued(arq)).job_id, arq, _queue_name=QUEUE, _deserializer=deserialize)
    abort = partial(job.abort, timeout=5, poll_delay=0.01)
    async with AsyncExitStack() as stack:
        if moment == "running":
            await stack.enter_async_context(worker_of(arq, f))
            await running.wait()
        async with asyncio.TaskGroup() as tasks:
            aborting = tasks.create_task(abort())
            if moment == "waiting":
                await wait_until(lambda: redis.exists("arq:abort"), "the abort is written")
                await stack.enter_async_context(worker_of(arq, f))
        assert aborting.result()
        assert await job.status() is JobStatus.complete
    assert not await redis.exists("arq:abort")


async def test_a_function_that_hears_a_cancel_may_still_wait_with_a_timeout(arq: QueuePool) -> None:
    """Its task is the one that leaves the queue, whose own timeouts must work."""

    async def f(_ctx: dict[Any, Any]) -> None:
        await asyncio.Event().wait()

    job = await enqueued(arq)
    async with worker_of(arq, f) as worker:
        await wait_until(lambda: worker.job_tasks, "it runs")
        (task,) = worker.job_tasks.values()
        worker.drain()
        worker.drain()
        await wait_until(lambda: not worker.tasks, "it is given back")
        assert task.done()
        assert task.cancelling() == 0
    assert await job.status() in (JobStatus.queued, JobStatus.deferred)


@pytest.mark.immortal_keys("a result that is to be kept for ever")
@pytest.mark.parametrize(
    ("options", "lowest_ms", "highest_ms"),
    [
        ({"keep_result": 0}, -2, -2),
        ({"keep_result": 0.0005}, -2, -2),
        ({"keep_result": 60}, 50_000, 60_000),
        ({}, 3_500_000, 3_600_000),
        ({"keep_result_forever": True}, -1, -1),
    ],
)
async def test_a_result_is_kept_as_long_as_its_function_wants(
    arq: QueuePool, redis: Redis, options: dict[str, Any], lowest_ms: int, highest_ms: int
) -> None:
    """-1 and -2 are Redis's answers for a key without an end, and for no key."""

    async def f(_ctx: dict[Any, Any]) -> int:
        return 1

    job = await enqueued(arq)
    async with worker_of(arq, f, **options) as worker:
        await wait_until(lambda: worker.jobs_complete and not worker.tasks, "it has run")
    assert lowest_ms <= await redis.pttl(f"arq:result:{job.job_id}") <= highest_ms
    assert not await redis.exists(f"arq:job:{job.job_id}", f"arq:in-progress:{job.job_id}")


async def test_a_function_is_called_no_more_often_than_it_wants(arq: QueuePool) -> None:
    calls = 0

    async def f(_ctx: dict[Any, Any]) -> None:
        nonlocal calls
        calls += 1
        raise RetryJob

    job = await enqueued(arq)
    async with worker_of(arq, f, max_tries=2):
        with pytest.raises(JobExecutionFailed, match="max 2 retries exceeded"):
            await outcome(job)
    assert calls == 2


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (None, "job expired"),
        (b"[", "unable to deserialize"),
        (b'{"t":1,"f":"g","a":[],"k":{},"et":1}', "'g' not found"),
    ],
)
async def test_a_job_whose_function_can_not_be_called_fails(
    arq: QueuePool, redis: Redis, record: bytes | None, words: str
) -> None:
    async def f(_ctx: dict[Any, Any]) -> None:
        raise AssertionError("not called")

    job = await enqueued(arq)
    await (redis.delete(f"arq:job:{job.job_id}") if record is None else redis.set(f"arq:job:{job.job_id}", record))
    async with worker_of(arq, f) as worker:
        with pytest.raises(JobExecutionFailed, match=words):
            await outcome(job)
        assert worker.jobs_failed == 1
