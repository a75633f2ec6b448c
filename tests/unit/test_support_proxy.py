"""The proxy between a client and a real server."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError

from support.proxy import TcpProxy, tcp_proxy
from support.valkey import Valkey
from support.waiting import wait_until


@pytest.fixture
async def proxy(valkey: Valkey) -> AsyncIterator[TcpProxy]:
    async with tcp_proxy(valkey.port) as proxy:
        yield proxy


@pytest.fixture
async def client(proxy: TcpProxy) -> AsyncIterator[Redis]:
    """One that does not try again, so that a test sees each break."""
    pool = ConnectionPool.from_url(proxy.url, retry=Retry(NoBackoff(), 0))
    async with Redis(connection_pool=pool) as client:
        yield client
    await pool.disconnect()


async def test_commands_and_large_replies_pass_through_whole(client: Redis, redis: Redis) -> None:
    value = bytes(range(256)) * 20_000
    await client.set("key", value, ex=60)
    assert await client.get("key") == await redis.get("key") == value


async def test_a_cut_breaks_what_is_open_and_nothing_after_it(client: Redis, proxy: TcpProxy) -> None:
    await client.ping()
    assert (proxy.accepted, proxy.open) == (1, 1)
    waiting = asyncio.ensure_future(client.execute_command("BLPOP", "nothing", 0))
    await wait_until(lambda: _is_blocked(client), "the read is blocked")
    proxy.cut()
    with pytest.raises(RedisConnectionError):
        await waiting
    await wait_until(lambda: proxy.open == 0, "the links are gone")
    assert await client.ping()


async def test_what_is_forgotten_stays_open_and_silent_and_new_connections_work(
    client: Redis, proxy: TcpProxy, valkey: Valkey
) -> None:
    await client.ping()
    proxy.forget()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(client.ping(), 0.1)
    async with Redis.from_url(proxy.url) as other:
        assert await other.ping()


async def _is_blocked(client: Redis) -> bool:
    return bool((await client.info("clients"))["blocked_clients"])


async def test_a_lost_reply_is_of_a_command_that_was_executed(client: Redis, proxy: TcpProxy, redis: Redis) -> None:
    await client.ping()
    proxy.cut_after_reply_bytes(0)
    with pytest.raises(RedisConnectionError):
        await client.set("key", "value", ex=60)
    assert await redis.get("key") == b"value"
    assert await client.get("key") == b"value", "it happens once"


@pytest.mark.parametrize("count", [0, 1, 6, 7, 13, 14, 20])
async def test_exactly_the_allowed_bytes_of_replies_arrive(proxy: TcpProxy, count: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    proxy.cut_after_reply_bytes(count)
    writer.write(b"PING\r\n" * 3)
    assert await reader.read() == (b"+PONG\r\n" * 3)[:count]
    writer.close()
    await writer.wait_closed()


async def test_the_end_of_one_direction_leaves_the_other_open(proxy: TcpProxy) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(b"PING\r\n")
    assert await reader.readline() == b"+PONG\r\n"
    writer.write_eof()
    assert await asyncio.wait_for(reader.read(), 5) == b"", "the server has closed in its turn"
    await wait_until(lambda: proxy.open == 0, "the link is gone")
    writer.close()
    await writer.wait_closed()


async def test_what_a_paused_proxy_holds_comes_later(client: Redis, proxy: TcpProxy, redis: Redis) -> None:
    await client.ping()
    proxy.pause()
    setting = asyncio.ensure_future(client.set("key", "value", ex=60))
    done, _ = await asyncio.wait([setting], timeout=0.2)
    assert not done
    assert not await redis.exists("key")
    proxy.resume()
    assert await asyncio.wait_for(setting, 5)


async def test_a_delay_is_of_each_direction(client: Redis, proxy: TcpProxy) -> None:
    await client.ping()
    proxy.delay_s = 0.05
    loop = asyncio.get_running_loop()
    started = loop.time()
    await client.ping()
    assert loop.time() - started > 0.095


async def test_a_refusing_proxy_lets_nobody_in_and_leaves_others_alone(client: Redis, proxy: TcpProxy) -> None:
    await client.ping()
    proxy.refuses = True
    with pytest.raises(RedisConnectionError):
        async with Redis.from_url(proxy.url, retry=Retry(NoBackoff(), 0)) as other:
            await other.ping()
    assert await client.ping()


async def test_a_server_that_is_down_looks_like_one(fresh_valkey: Valkey) -> None:
    async with tcp_proxy(fresh_valkey.port) as proxy:
        async with Redis.from_url(proxy.url, retry=Retry(NoBackoff(), 0)) as client:
            await client.ping()
            fresh_valkey.kill()
            for _ in range(2):
                with pytest.raises(RedisConnectionError):
                    await client.ping()
            fresh_valkey.start()
            assert await client.ping()


async def test_its_end_ends_every_connection(valkey: Valkey) -> None:
    async with tcp_proxy(valkey.port) as proxy:
        proxy.pause()
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"PING\r\n")
        await wait_until(lambda: proxy.open == 1, "the connection is there")
    assert await reader.read() == b""
    assert proxy.open == 0
    writer.close()
    await writer.wait_closed()
