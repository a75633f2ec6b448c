"""Networks that neither deliver nor say so: a link that a firewall has forgotten, and one that is only slow."""

import asyncio
from collections.abc import AsyncIterator

import orjson
import pytest
from redis.asyncio import Redis

from deltafan import Consumer, Producer
from support.proxy import TcpProxy, tcp_proxy
from support.valkey import Valkey

HI = [{"role": "user", "content": "Hi"}]
EVENTS, BELL = "deltafan:{j}:events", "deltafan:{j}:bell"
SWEEP_S = 0.3


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltafan._hub.SWEEP_S", SWEEP_S)
    monkeypatch.setattr("deltafan._client._SILENCE_S", 0.3)


@pytest.fixture
async def proxy(valkey: Valkey) -> AsyncIterator[TcpProxy]:
    async with tcp_proxy(valkey.port) as proxy:
        yield proxy


async def write(redis: Redis, seq: int, text: bytes) -> None:
    await redis.xadd(EVENTS, {"type": "content", "data": text}, id=f"5-{seq}")


@pytest.fixture
async def job(producer: Producer, redis: Redis) -> None:
    await producer.submit(model="m", messages=HI, job_id="j")
    await redis.xadd(EVENTS, {"type": "started", "data": orjson.dumps({"mode": "fresh"})}, id="5-0")
    await redis.expire(EVENTS, 600)


@pytest.mark.usefixtures("job")
async def test_readers_leave_connections_that_have_fallen_silent(proxy: TcpProxy, redis: Redis) -> None:
    async with Consumer.connect(proxy.url) as consumer, consumer.tail("j") as events:
        await anext(events)
        proxy.forget()
        await write(redis, 1, b"behind the silence")
        assert (await asyncio.wait_for(anext(events), 10)).text == "behind the silence"


@pytest.mark.usefixtures("job")
async def test_a_page_that_takes_longer_than_a_sweep_arrives(proxy: TcpProxy, redis: Redis) -> None:
    for seq in range(1, 41):
        await write(redis, seq, b"x" * 65_536)
    async with Consumer.connect(proxy.url) as consumer:
        proxy.delay_s = SWEEP_S / 5  # for each 64 KB: the page takes eight sweeps
        async with consumer.tail("j", after="5-0") as events:
            assert len((await asyncio.wait_for(anext(events), 30)).text) == 65_536
    assert proxy.accepted == 2, "on the connections that there were"


async def test_a_submit_leaves_a_connection_that_a_firewall_has_forgotten(proxy: TcpProxy, redis: Redis) -> None:
    async with Producer.connect(proxy.url) as producer:
        await producer.submit(model="m", messages=HI, job_id="a")
        proxy.forget()
        assert (await asyncio.wait_for(producer.submit(model="m", messages=HI, job_id="b"), 5)).created
    assert await redis.zcard("deltafan:queue:interactive") == 2
