import os
from collections.abc import AsyncIterator, Iterator

import pytest
from redis.asyncio import Redis

from deltafan import Consumer, Producer
from support.valkey import Valkey, valkey_server

# Keys that may live for ever: the queues, the ledger and what arq itself never lets expire.
ETERNAL = (b"deltafan:queue:interactive", b"deltafan:queue:batch", b"deltafan:usage", b"arq:queue", b"arq:abort")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("DELTAFAN_") or name in ("OPENAI_API_KEY", "DASHSCOPE_API_KEY"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def valkey() -> Iterator[Valkey]:
    """One server for all tests that leave it running."""
    with valkey_server() as server:
        yield server


@pytest.fixture
def fresh_valkey() -> Iterator[Valkey]:
    """A server of the test's own, with an append-only file, to be killed and restarted."""
    with valkey_server(appendonly="yes", appendfsync="always") as server:
        yield server


@pytest.fixture
async def redis(valkey: Valkey) -> AsyncIterator[Redis]:
    """A plain client of the shared server, which is empty; after the test no key without a lifetime may be left."""
    client: Redis = Redis.from_url(valkey.url)
    await client.flushall()
    await client.script_flush()
    yield client
    immortal = [key async for key in client.scan_iter(count=1000) if await client.ttl(key) == -1 and key not in ETERNAL]
    await client.aclose()
    assert not immortal, f"keys without a lifetime: {immortal}"


@pytest.fixture
def redis_url(redis: Redis, valkey: Valkey) -> str:
    return valkey.url


@pytest.fixture
async def producer(redis_url: str) -> AsyncIterator[Producer]:
    async with Producer.connect(redis_url) as producer:
        yield producer


@pytest.fixture
async def consumer(redis_url: str) -> AsyncIterator[Consumer]:
    async with Consumer.connect(redis_url) as consumer:
        yield consumer
