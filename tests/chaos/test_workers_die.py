"""Worker processes die, freeze or are told to stop in the middle of a generation."""

import asyncio
import os
import signal
import subprocess
import time
from pathlib import Path

import orjson
import pytest
from redis.asyncio import Redis

from deltafan import Consumer, Event, JobFailed, Producer, UsageRecord, fold
from deltafan.testing import ScriptedUpstream
from deltafan.testing import chat as script
from support.waiting import wait_until
from support.workers import settings_env, worker_process

HI = [{"role": "user", "content": "Hi"}]
LEASE_S = 2


async def read(consumer: Consumer, job_id: str) -> list[Event]:
    async with consumer.tail(job_id) as events:
        return [event async for event in events]


async def ledger(redis: Redis) -> list[tuple[int, str]]:
    entries = await redis.xrange("deltafan:usage")
    records = [UsageRecord.from_json(orjson.loads(fields[b"data"])) for _, fields in entries]
    return sorted((record.attempt_no, record.outcome) for record in records)


@pytest.fixture
def env(redis_url: str, upstream: ScriptedUpstream, tmp_path: Path) -> dict[str, str]:
    return settings_env(redis_url, upstream.url, tmp_path, lease_s=LEASE_S, drain_timeout_s=30)


async def has_begun(consumer: Consumer, job_id: str) -> bool:
    return (await consumer.snapshot(job_id)).content != ""


async def test_a_killed_workers_job_runs_again_when_its_lease_is_over(
    producer: Producer, consumer: Consumer, redis: Redis, env: dict[str, str], upstream: ScriptedUpstream
) -> None:
    upstream.then([script.delta(content="void"), asyncio.Event()])
    job = await producer.submit(model="sim", messages=HI)
    with worker_process(env) as first:
        await wait_until(lambda: has_begun(consumer, job.id), "the first worker has published")
        reading = asyncio.create_task(read(consumer, job.id))
        first.kill()
        killed_at = time.monotonic()
        with worker_process(env):
            events = await asyncio.wait_for(reading, 30)
            assert time.monotonic() - killed_at < LEASE_S + 8, "lease plus a process's start"
            assert fold(events).content == "Hello, world!"
            assert [event.started.mode for event in events if event.started] == ["fresh", "restart"]
            await wait_until(lambda: redis.exists("deltafan:usage"), "the bills are written")
            assert await ledger(redis) == [(1, "lost"), (2, "completed")]


async def test_on_interrupt_fail_ends_a_killed_workers_job(
    producer: Producer, consumer: Consumer, env: dict[str, str], upstream: ScriptedUpstream
) -> None:
    upstream.then([script.delta(content="half"), asyncio.Event()])
    job = await producer.submit(model="sim", messages=HI, on_interrupt="fail")
    with worker_process(env) as first:
        await wait_until(lambda: has_begun(consumer, job.id), "the first worker has published")
        first.kill()
        with worker_process(env):
            with pytest.raises(JobFailed, match="forbids a restart"):
                await consumer.result(job.id, timeout=30)
    assert len(upstream.requests) == 1


async def test_a_frozen_worker_that_wakes_changes_nothing(
    producer: Producer, consumer: Consumer, redis: Redis, env: dict[str, str], upstream: ScriptedUpstream
) -> None:
    gate = asyncio.Event()
    upstream.then([script.delta(content="zombie "), gate, script.delta(content="brains"), *script.ending()])
    job = await producer.submit(model="sim", messages=HI)
    with worker_process(env) as zombie:
        await wait_until(lambda: has_begun(consumer, job.id), "the first worker has published")
        await wait_until(lambda: _runs(1, zombie, redis), "it shows that it is busy")
        zombie.send_signal(signal.SIGSTOP)
        with worker_process(env):
            result = await consumer.result(job.id, timeout=30)
            before = await redis.xrange(f"deltafan:{{{job.id}}}:events")
            gate.set()
            zombie.send_signal(signal.SIGCONT)
            await wait_until(lambda: _runs(0, zombie, redis), "the zombie has let go")
            await wait_until(lambda: redis.exists(f"arq:result:{job.id}"), "the job is closed")
            assert result.content == "Hello, world!"
            assert await redis.xrange(f"deltafan:{{{job.id}}}:events") == before
            assert [outcome for _, outcome in await ledger(redis)].count("completed") == 1
            assert len(await redis.xrange("deltafan:usage")) == 2


async def _runs(count: int, process: "subprocess.Popen[bytes]", redis: Redis) -> bool:
    """Whether a worker process shows that it runs so many jobs."""
    keys = [key async for key in redis.scan_iter(match="deltafan:worker:*") if key.endswith(b":%d" % process.pid)]
    return bool(keys) and orjson.loads(await redis.get(keys[0]) or b"{}").get("running") == count


async def test_sigterm_lets_a_running_job_end(
    producer: Producer, consumer: Consumer, env: dict[str, str], upstream: ScriptedUpstream
) -> None:
    gate = asyncio.Event()
    upstream.then([script.delta(content="to the "), gate, script.delta(content="end"), *script.ending()])
    job = await producer.submit(model="sim", messages=HI)
    with worker_process(env) as worker:
        await wait_until(lambda: has_begun(consumer, job.id), "the worker has published")
        worker.terminate()
        gate.set()
        assert (await consumer.result(job.id, timeout=10)).content == "to the end"
        assert await asyncio.to_thread(worker.wait, 15) == 0


async def test_after_the_drain_timeout_the_rest_is_handed_over_at_once(
    producer: Producer, consumer: Consumer, redis: Redis, env: dict[str, str], upstream: ScriptedUpstream
) -> None:
    upstream.then([script.delta(content="void"), asyncio.Event()])
    job = await producer.submit(model="sim", messages=HI)
    env = {**env, "DELTAFAN_DRAIN_TIMEOUT_S": "0", "DELTAFAN_LEASE_S": "60"}
    with worker_process(env), worker_process(env):
        await wait_until(lambda: has_begun(consumer, job.id), "one worker has published")
        pid = (await read_started(consumer, job.id)).rpartition(":")[2]
        os.kill(int(pid), signal.SIGTERM)
        result = await consumer.result(job.id, timeout=10)
        assert result.content == "Hello, world!"
        assert result.attempt_no == 1, "a hand-over spends no run"
        await wait_until(lambda: redis.exists("deltafan:usage"), "the bills are written")
        assert sorted(outcome for _, outcome in await ledger(redis)) == ["completed", "handed_over"]


async def read_started(consumer: Consumer, job_id: str) -> str:
    async with consumer.tail(job_id) as events:
        started = (await anext(events)).started
        assert started is not None
        return started.worker


async def test_three_deaths_end_the_job(
    producer: Producer, consumer: Consumer, redis: Redis, env: dict[str, str], upstream: ScriptedUpstream
) -> None:
    """The first one before the model has said anything, the others in mid-answer."""
    upstream.then([asyncio.Event()])
    upstream.standing = [script.delta(content="deadly"), asyncio.Event()]
    job = await producer.submit(model="sim", messages=HI)
    for run in range(1, 4):
        with worker_process(env) as worker:
            await wait_until(lambda run=run: len(upstream.requests) == run, f"run {run} has begun")  # type: ignore[misc]
            if run > 1:
                await wait_until(lambda: has_begun(consumer, job.id), "it has published")
            worker.kill()
    with worker_process(env):
        with pytest.raises(JobFailed, match="3 times"):
            await consumer.result(job.id, timeout=30)
        await wait_until(lambda: redis.exists("deltafan:usage"), "the bills are written")
        assert await ledger(redis) == [(1, "lost"), (2, "lost"), (3, "lost")]
