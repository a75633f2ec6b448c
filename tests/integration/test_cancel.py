"""Cancelling from anywhere, wherever the job is."""

import asyncio
from pathlib import Path

import pytest

from deltafan import Consumer, JobCancelled, JobNotFound, Producer
from deltafan.testing import Answer, Refuse, ScriptedUpstream, Text
from deltafan_worker._leased import LeasedWorker
from support.proxy import tcp_proxy
from support.valkey import Valkey
from support.waiting import wait_until
from support.workers import running_worker, settings_env

HI = [{"role": "user", "content": "Hi"}]


async def test_in_a_retry_pause(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream
) -> None:
    upstream.standing = Refuse(503, b"{}", {"Retry-After": "30"})
    job = await producer.submit(model="sim", messages=HI)
    await wait_until(lambda: upstream.requests, "the provider has refused")
    assert await producer.cancel(job.id, reason="enough") == "requested"
    with pytest.raises(JobCancelled, match="enough"):
        await consumer.result(job.id, timeout=5)
    assert len(upstream.requests) == 1


async def test_while_the_worker_has_lost_the_server(
    producer: Producer, consumer: Consumer, valkey: Valkey, redis_url: str, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    """The request is in the job's state before anybody is told: the worker finds it there when it is back."""
    assert redis_url == valkey.url
    upstream.then(Answer([Text("Once upon"), asyncio.Event()]))
    async with tcp_proxy(valkey.port) as proxy, running_worker(settings_env(proxy.url, upstream.url, tmp_path)):
        job = await producer.submit(model="sim", messages=HI)
        async with consumer.tail(job.id) as events:
            async for event in events:
                if event.text:
                    break
            proxy.refuses = True
            proxy.cut()
            assert await producer.cancel(job.id) == "requested"
            assert not upstream.requests[0].ended.is_set()
            proxy.refuses = False
            assert [event.type async for event in events] == ["cancelled"]
        await asyncio.wait_for(upstream.requests[0].ended.wait(), 5)


async def test_from_another_machine_and_twice(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream, redis_url: str
) -> None:
    upstream.then(Answer([Text("Once upon"), asyncio.Event()]))
    job = await producer.submit(model="sim", messages=HI)
    await wait_until(lambda: upstream.requests, "the model is called")
    async with Producer.connect(redis_url) as elsewhere:
        asked = await asyncio.gather(*[who.cancel(job.id) for who in (elsewhere, producer, elsewhere)])
    assert set(asked) <= {"requested", "ended"}
    with pytest.raises(JobCancelled):
        await consumer.result(job.id, timeout=5)
    assert await producer.cancel(job.id) == "ended", "a job that has ended stays as it is"


async def test_of_what_waits_alone_leaves_what_was_ever_begun(
    producer: Producer, consumer: Consumer, env: dict[str, str], upstream: ScriptedUpstream
) -> None:
    upstream.then(Answer([Text("Once upon"), asyncio.Event()]))
    async with running_worker(env) as worker:
        handed_over = await producer.submit(model="sim", messages=HI)
        await wait_until(lambda: upstream.requests, "the model is called")
        assert await producer.cancel_waiting([handed_over.id]) == []
        worker.drain()
        worker.drain()
        await wait_until(lambda: not worker.tasks, "it is given to others")
    fresh = await producer.submit(model="sim", messages=HI)
    asked = [handed_over.id, fresh.id, "unknown"]
    assert await producer.cancel_waiting(asked, reason="enough") == [fresh.id]
    assert await producer.cancel_waiting(asked) == [], "what has ended has ended"
    with pytest.raises(JobCancelled, match="enough"):
        await consumer.result(fresh.id, timeout=5)
    async with running_worker(env):
        assert (await consumer.result(handed_over.id, timeout=10)).status == "completed"
    assert len(upstream.requests) == 2


async def test_of_a_job_that_nobody_knows(producer: Producer) -> None:
    with pytest.raises(JobNotFound):
        await producer.cancel("never-submitted")
