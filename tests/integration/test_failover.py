"""A planned failover: the replica is promoted, and the old primary follows it and keeps its connections open."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import ReadOnlyError

from deltafan import Consumer, Producer
from deltafan.testing import ScriptedUpstream
from deltafan.testing import chat as script
from deltafan_worker._queue_pool import queue_pool
from support.proxy import TcpProxy, tcp_proxy
from support.valkey import valkey_server
from support.waiting import wait_until
from support.workers import running_worker, settings_env
from support.writing import END, begun, publishing

HI = [{"role": "user", "content": "Hi"}]


@dataclass
class Pair:
    """A primary with a replica of it, and the name under which clients find the primary."""

    old: Redis
    new: Redis
    new_url: str
    new_port: int
    name: TcpProxy

    async def fail_over(self) -> None:
        await self.new.replicaof("NO", "ONE")
        self.name.retarget(self.new_port, cut=False)
        await self.old.replicaof("127.0.0.1", str(self.new_port))
        await wait_until(lambda: follows(self.old), "the old primary follows")


async def follows(server: Redis) -> bool:
    return bool((await server.info("replication")).get("master_link_status") == "up")


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    quick = {"repl-diskless-sync-delay": "0"}
    with valkey_server(**quick) as one, valkey_server(**quick) as two:
        async with Redis(port=one.port) as old, Redis(port=two.port) as new, tcp_proxy(one.port) as name:
            await new.replicaof("127.0.0.1", str(one.port))
            await wait_until(lambda: follows(new), "the replica follows")
            yield Pair(old, new, two.url, two.port, name)


@asynccontextmanager
async def clients(redis_url: str, streams_url: str) -> AsyncIterator[tuple[Producer, Consumer]]:
    async with Producer.connect(redis_url, streams_url=streams_url) as producer:
        async with Consumer.connect(streams_url) as consumer:
            yield producer, consumer


@pytest.mark.parametrize("whose", ["queue", "queue_and_streams"])
async def test_running_and_later_jobs_end(whose: str, pair: Pair, upstream: ScriptedUpstream, tmp_path: Path) -> None:
    gate = asyncio.Event()
    upstream.then([script.delta(content="Hello, "), gate, script.delta(content="world!"), *script.ending()])
    with valkey_server() as other:
        before, after = (pair.name.url, pair.new_url) if whose == "queue_and_streams" else (other.url, other.url)
        env = settings_env(pair.name.url, upstream.url, tmp_path, streams_url=before)
        async with running_worker(env):
            async with clients(pair.name.url, before) as (producer, _):
                running = await producer.submit(model="sim", messages=HI)
                await wait_until(lambda: upstream.requests, "it runs")
            await pair.fail_over()
            async with clients(pair.new_url, after) as (producer, consumer):
                later = await producer.submit(model="sim", messages=HI)
                assert (await consumer.result(later.id, timeout=15)).content == "Hello, world!"
                gate.set()
                assert (await consumer.result(running.id, timeout=15)).content == "Hello, world!"
                for job in (running, later):
                    await wait_until(partial(pair.new.exists, f"arq:result:{job.id}"), "the queue is told")
    assert len(upstream.requests) == 2


async def test_an_end_is_confirmed_by_the_new_primary(pair: Pair) -> None:
    async with Producer.connect(pair.name.url) as producer:
        async with publishing(pair.name.url, replicas=1, timeout_ms=100) as publisher:
            for job_id in ("before", "after"):
                writer = await begun(publisher, producer, job_id)
                if job_id == "after":
                    await pair.fail_over()
                async with asyncio.timeout(15):
                    await writer.finish(lambda _: END)
            assert await pair.new.exists("deltafan:{after}:result")


async def test_each_of_the_queues_connections_learns_it(pair: Pair) -> None:
    async with queue_pool(pair.name.url) as pool:

        async def write() -> list[object]:
            writes = [pool.set(f"key-{number}", "value", px=60_000) for number in range(3)]
            return await asyncio.gather(*writes, return_exceptions=True)

        assert await write() == [True] * 3
        await pair.fail_over()
        assert [type(reply) for reply in await write()] == [ReadOnlyError] * 3
        assert await write() == [True] * 3
