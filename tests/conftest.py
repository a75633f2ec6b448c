import os
import signal
from collections.abc import AsyncIterator, Iterator
from importlib.util import find_spec

import pytest
from redis.asyncio import Redis

from deltafan import Consumer, Producer
from support.leaks import immortal_keys
from support.valkey import Valkey, valkey_server

# What needs more than the client library does not exist where only that is installed.
collect_ignore = (
    [] if find_spec("arq") else ["contract/test_arq.py", "contract/test_bodies.py", "contract/test_wire.py"]
)
collect_ignore_glob = [] if find_spec("aiohttp") else ["contract/test_simulated_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    # A shell's background job ignores Ctrl-C, one under nohup the terminal's end; and so would whatever a test starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    config.addinivalue_line("markers", "immortal_keys(reason): this test may leave keys without a lifetime")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("DELTAFAN_") or name in ("OPENAI_API_KEY", "DASHSCOPE_API_KEY", "DEEPSEEK_API_KEY"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def valkey() -> Iterator[Valkey]:
    """One server for all tests of this process that leave it running."""
    with valkey_server() as server:
        yield server


@pytest.fixture
def fresh_valkey() -> Iterator[Valkey]:
    """A server of the test's own, with an append-only file, to be killed and restarted."""
    with valkey_server(appendonly="yes", appendfsync="always") as server:
        yield server


@pytest.fixture
async def redis(valkey: Valkey, request: pytest.FixtureRequest) -> AsyncIterator[Redis]:
    """A plain client of the shared server, which is empty; after the test no key without a lifetime may be left."""
    async with Redis.from_url(valkey.url) as client:
        await client.flushall()
        await client.script_flush()
        yield client
        left = await immortal_keys(client)
    if request.node.get_closest_marker("immortal_keys") is None:
        assert not left, f"keys without a lifetime: {left}"


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
