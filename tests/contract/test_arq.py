"""arq on both sides of the queue: stock producers, stock workers and stock Job handles."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from arq.connections import ArqRedis
from arq.jobs import Job as ArqJob
from arq.jobs import JobStatus
from arq.worker import Worker, func
from redis.asyncio import ConnectionPool, Redis

from deltafan import Consumer, JobCancelled, JobFailed, Producer
from deltafan._keys import FUNCTION
from deltafan.testing import ScriptedUpstream, scripted_upstream
from deltafan.testing import chat as script
from deltafan_worker.serialization import deserialize, serialize
from support.waiting import wait_until
from support.workers import running_worker, settings_env

QUEUE = "deltafan:queue:interactive"
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture
async def arq(redis_url: str) -> AsyncIterator[ArqRedis]:
    """A stock client, given our JSON in place of pickle."""
    pool = ConnectionPool.from_url(redis_url)
    client = ArqRedis(pool, job_serializer=serialize, job_deserializer=deserialize, default_queue_name=QUEUE)
    yield client
    await client.aclose(close_connection_pool=True)


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with scripted_upstream() as upstream:
        yield upstream


@pytest.fixture
def env(redis_url: str, upstream: ScriptedUpstream, tmp_path: Path) -> dict[str, str]:
    return settings_env(redis_url, upstream.url, tmp_path)


def handle(arq: ArqRedis, job_id: str) -> ArqJob:
    return ArqJob(job_id, arq, _queue_name=QUEUE, _deserializer=deserialize)


async def test_a_stock_worker_runs_a_job_that_producer_enqueued(
    producer: Producer, arq: ArqRedis, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    seen: dict[str, Any] = {}

    async def generate(ctx: dict[Any, Any], **fields: Any) -> str:
        seen.update(fields, job_id=ctx["job_id"])
        return "ran"

    job = await producer.submit(model="m", messages=HI, tenant="acme", metadata={"a": "b"})
    assert await handle(arq, job.id).status() is JobStatus.queued
    worker = Worker(
        [func(generate, name=FUNCTION)],
        redis_pool=arq,
        queue_name=QUEUE,
        burst=True,
        poll_delay=0.01,
        handle_signals=False,
        job_serializer=serialize,
        job_deserializer=deserialize,
    )
    await worker.async_run()
    assert (seen["job_id"], seen["model"], seen["tenant"], seen["metadata"]) == (job.id, "m", "acme", {"a": "b"})
    assert seen["body"] == {"messages": HI}
    assert await handle(arq, job.id).result(timeout=5) == "ran"
    await arq.delete(f"{QUEUE}:health-check")
    assert f"{job.id}:{FUNCTION}(" in caplog.text, "it logs the arguments"
    assert "role" not in caplog.text, "but not the prompt"


async def test_ours_runs_a_job_that_a_stock_client_enqueued(
    arq: ArqRedis, env: dict[str, str], consumer: Consumer
) -> None:
    job = await arq.enqueue_job(FUNCTION, model="sim", messages=HI)
    assert job is not None
    async with running_worker(env):
        assert (await consumer.result(job.job_id, timeout=10)).content == "Hello, world!"
        assert await job.result(timeout=10, poll_delay=0.02) == {"job_id": job.job_id, "status": "completed"}
    assert await job.status() is JobStatus.complete


async def test_a_stock_clients_job_that_nobody_has_begun_is_ended_by_cancel_alone(
    producer: Producer, arq: ArqRedis
) -> None:
    job = await arq.enqueue_job(FUNCTION, model="sim", messages=HI)
    assert job is not None
    assert await producer.cancel_waiting([job.job_id]) == []
    assert await producer.cancel(job.job_id) == "cancelled"


async def test_status_and_result_of_our_jobs(
    producer: Producer, arq: ArqRedis, env: dict[str, str], upstream: ScriptedUpstream
) -> None:
    gate = asyncio.Event()
    upstream.then([script.delta(content="Hi"), gate, *script.ending()])
    job = await producer.submit(model="sim", messages=HI)
    async with running_worker(env):
        await upstream.arrived.wait()
        assert await handle(arq, job.id).status() is JobStatus.in_progress
        gate.set()
        result = await handle(arq, job.id).result(timeout=10, poll_delay=0.02)
        assert result == {"job_id": job.id, "status": "completed"}
        info = await handle(arq, job.id).result_info()
        assert info is not None
        assert info.success
        assert info.kwargs == {}, "the prompt is not kept a second time"


async def test_abort_of_a_running_job_cancels_it_for_everybody(
    producer: Producer, consumer: Consumer, arq: ArqRedis, env: dict[str, str], upstream: ScriptedUpstream
) -> None:
    upstream.then([script.delta(content="Once upon"), asyncio.Event()])
    job = await producer.submit(model="sim", messages=HI)
    async with running_worker(env):
        await upstream.arrived.wait()
        assert await handle(arq, job.id).abort(timeout=10, poll_delay=0.02)
        with pytest.raises(JobCancelled, match="aborted"):
            await consumer.result(job.id, timeout=5)
        assert not await arq.exists("arq:abort")


async def test_abort_of_a_waiting_job_writes_its_terminal_entry(
    producer: Producer, consumer: Consumer, arq: ArqRedis, env: dict[str, str], upstream: ScriptedUpstream
) -> None:
    job = await producer.submit(model="sim", messages=HI)
    aborting = asyncio.create_task(handle(arq, job.id).abort(timeout=10, poll_delay=0.02))
    await wait_until(lambda: arq.exists("arq:abort"), "the abort is written")
    async with running_worker(env):
        assert await aborting
        with pytest.raises(JobCancelled):
            await consumer.result(job.id, timeout=5)
    assert upstream.requests == []


async def test_a_job_whose_record_expired_ends_as_failed(
    producer: Producer, consumer: Consumer, redis: Redis, env: dict[str, str]
) -> None:
    job = await producer.submit(model="sim", messages=HI)
    await redis.delete(f"arq:job:{job.id}")
    async with running_worker(env):
        with pytest.raises(JobFailed, match="expired") as caught:
            await consumer.result(job.id, timeout=10)
    assert caught.value.generation.failure is not None
    assert caught.value.generation.failure.code == "not_run"


async def test_a_malformed_job_fails_and_says_why(arq: ArqRedis, env: dict[str, str], consumer: Consumer) -> None:
    job = await arq.enqueue_job(FUNCTION, model="sim", mesages=HI)
    assert job is not None
    async with running_worker(env):
        with pytest.raises(JobFailed, match="did you mean messages"):
            await consumer.result(job.job_id, timeout=10)


async def test_both_lanes_are_served_the_interactive_one_first(
    producer: Producer, consumer: Consumer, env: dict[str, str], upstream: ScriptedUpstream
) -> None:
    batch = await producer.submit(model="sim", messages=HI, lane="batch", body={"seed": 1})
    chat = await producer.submit(model="sim", messages=HI, body={"seed": 2})
    async with running_worker({**env, "DELTAFAN_CONCURRENCY": "1"}):
        for job in (batch, chat):
            await consumer.result(job.id, timeout=10)
    assert [request.body["seed"] for request in upstream.requests] == [2, 1]


async def test_a_burst_worker_stops_when_nothing_is_due(
    producer: Producer, env: dict[str, str], upstream: ScriptedUpstream
) -> None:
    await producer.submit_many([{"model": "sim", "messages": HI}] * 12)
    async with running_worker({**env, "DELTAFAN_CONCURRENCY": "5"}, burst=True) as worker:
        await wait_until(lambda: worker.jobs_complete == 12, "all jobs have run")
    assert len(upstream.requests) == 12


async def test_prompts_and_answers_stay_out_of_the_logs(
    producer: Producer,
    consumer: Consumer,
    env: dict[str, str],
    upstream: ScriptedUpstream,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("DEBUG")
    upstream.then(script.text("ANSWER-1234"), [script.delta(content="ANSWER-1234"), script.Raw(b"data: {PROMPT\n\n")])
    for _ in range(2):
        job = await producer.submit(model="sim", messages=[{"role": "user", "content": "PROMPT-5678"}])
        async with running_worker(env):
            await consumer.result(job.id, timeout=10)
    assert "POST /v1/chat/completions" in caplog.text, "the log was on"
    assert "PROMPT" not in caplog.text
    assert "ANSWER" not in caplog.text
