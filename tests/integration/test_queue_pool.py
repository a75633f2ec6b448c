"""The queue's connections: where their client library falls short, and those of our own."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from hashlib import sha1
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from deltafan import Consumer, Producer
from deltafan._lua import Script
from deltafan.testing import ScriptedUpstream
from deltafan_worker import _queue_pool
from deltafan_worker._queue_pool import hear_a_ring, queue_pool, run_script
from support.proxy import TcpProxy, tcp_proxy
from support.valkey import Valkey, valkey_server
from support.waiting import wait_until
from support.workers import running_worker, settings_env


def cancel_after(steps: int, task: asyncio.Task[None]) -> None:
    """Cancel it when the loop has turned so often."""
    if steps:
        asyncio.get_running_loop().call_soon(cancel_after, steps - 1, task)
    else:
        task.cancel()


async def test_a_job_runs_over_a_socket_file(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    with valkey_server(unixsocket=str(tmp_path / "valkey.sock")):
        url = f"unix://{tmp_path}/valkey.sock?db=1"
        async with Producer.connect(url) as producer, Consumer.connect(url) as consumer:
            job = await producer.submit(model="sim", messages=[{"role": "user", "content": "Hi"}])
            async with running_worker(settings_env(url, upstream.url, tmp_path), burst=True):
                assert (await consumer.result(job.id, timeout=10)).content == "Hello, world!"


async def test_a_cancel_is_never_forgotten_whenever_it_comes(redis_url: str) -> None:
    async with queue_pool(redis_url) as pool:

        async def ask_for_ever() -> None:
            while True:
                assert await pool.echo("x") == b"x"

        for steps in [*range(60)] * 10:
            task = asyncio.create_task(ask_for_ever())
            cancel_after(steps, task)
            done, _ = await asyncio.wait([task], timeout=5)
            assert done, f"cancelled after {steps} steps of the loop, it went on"
            assert task.cancelled(), "its replies are its own"


def script(source: bytes) -> Script:
    return Script("test", source, sha1(source, usedforsecurity=False).hexdigest().encode())


ECHO = script(b"return ARGV")


@pytest.fixture
async def proxy(valkey: Valkey) -> AsyncIterator[TcpProxy]:
    async with tcp_proxy(valkey.port) as proxy:
        yield proxy


async def test_scripts_share_a_connection_and_have_replies_of_their_own(proxy: TcpProxy) -> None:
    async with queue_pool(proxy.url) as pool, asyncio.TaskGroup() as group:
        replies = [group.create_task(run_script(pool, ECHO, (), (n, b"x"))) for n in range(50)]
        assert [await reply for reply in replies] == [[b"%d" % n, b"x"] for n in range(50)]
        assert proxy.accepted == 1


async def test_a_script_that_fails_says_so_and_others_run(redis_url: str) -> None:
    async with queue_pool(redis_url) as pool:
        with pytest.raises(ResponseError, match="no such thing"):
            await run_script(pool, script(b"return redis.error_reply('ERR no such thing')"), (), ())
        assert await run_script(pool, ECHO, (), ("x",)) == [b"x"]


async def test_a_script_whose_connection_is_cut_is_an_error_and_the_next_one_runs(proxy: TcpProxy) -> None:
    async with queue_pool(proxy.url) as pool:
        await run_script(pool, ECHO, (), ())
        proxy.pause()
        lost = asyncio.ensure_future(run_script(pool, ECHO, (), ()))
        await asyncio.wait([lost], timeout=0.05)
        proxy.cut()
        proxy.resume()
        with pytest.raises(RedisConnectionError):
            await lost
        assert await run_script(pool, ECHO, (), ("x",)) == [b"x"]


async def test_a_script_that_was_waited_for_in_vain_leaves_its_connection(
    proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_queue_pool, "PATIENCE_S", 0.05)
    async with queue_pool(proxy.url) as pool, asyncio.timeout(5):
        await run_script(pool, ECHO, (), ())
        proxy.forget()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await run_script(pool, ECHO, (), ())
        assert await run_script(pool, ECHO, (), ("x",)) == [b"x"]


async def test_a_link_that_has_gone_dead_is_left_while_heartbeats_go_on(
    proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_queue_pool, "_SCRIPTS_SILENCE_S", 0.2)
    async with queue_pool(proxy.url) as pool, asyncio.timeout(5):
        await run_script(pool, ECHO, (), ())
        proxy.forget()
        assert await run_script(pool, ECHO, (), ("a",), is_heartbeat=True) == [b"a"]
        with pytest.raises(RedisConnectionError):
            await run_script(pool, ECHO, (), ())
        assert await run_script(pool, ECHO, (), ("b",)) == [b"b"]


async def test_a_connection_that_opens_too_late_is_closed(proxy: TcpProxy) -> None:
    async with queue_pool(proxy.url) as pool:
        proxy.pause()
        late = asyncio.ensure_future(run_script(pool, ECHO, (), ()))
        await wait_until(lambda: proxy.accepted == 1, "it opens")
    proxy.resume()
    with pytest.raises(RedisConnectionError):
        await late
    assert pool.scripts._usable is None


async def test_whoever_is_cancelled_at_once_leaves_the_others_their_connection(proxy: TcpProxy) -> None:
    """Its reply is on its way; behind it come a claim's, whose jobs would stand leased to nobody, and others'."""
    async with queue_pool(proxy.url) as pool, asyncio.timeout(5):
        await run_script(pool, ECHO, (), ())
        proxy.pause()
        cut, other = (asyncio.ensure_future(run_script(pool, ECHO, (), (name,))) for name in "ab")
        await asyncio.wait([cut, other], timeout=0.05)
        cut.cancel()
        proxy.resume()
        assert await other == [b"b"]
        assert proxy.accepted == 1


async def test_whoever_has_heard_of_others_leaves_them_their_connection(
    proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_queue_pool, "PATIENCE_S", 0.0)
    async with queue_pool(proxy.url) as pool, asyncio.timeout(5):
        first = asyncio.ensure_future(run_script(pool, ECHO, (), ("a",)))
        slow = asyncio.ensure_future(pool.scripts.ask(lambda connection: connection.call("BLPOP", "nothing", 0.1)))
        assert await first == [b"a"]
        slow.cancel()
        assert await run_script(pool, ECHO, (), ("b",)) == [b"b"]
        assert proxy.accepted == 1


async def test_a_heartbeat_waits_behind_no_other_script_and_is_given_up_without_any(
    proxy: TcpProxy,
) -> None:
    async with queue_pool(proxy.url) as pool, asyncio.timeout(5):
        await asyncio.gather(*[run_script(pool, ECHO, (), (), is_heartbeat=is_one) for is_one in (False, True)])
        proxy.pause()
        script = asyncio.ensure_future(run_script(pool, ECHO, (), ("a",)))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await run_script(pool, ECHO, (), (), is_heartbeat=True)
        proxy.resume()
        assert await script == [b"a"]
        assert await run_script(pool, ECHO, (), ("b",), is_heartbeat=True) == [b"b"]
        assert proxy.accepted == 3


async def test_a_pool_that_is_closed_opens_nothing(redis_url: str) -> None:
    async with queue_pool(redis_url) as pool:
        pass
    with pytest.raises(RedisConnectionError, match="closed"):
        await run_script(pool, ECHO, (), ())


async def test_whoever_is_cancelled_while_it_opens_leaves_that_to_the_next(proxy: TcpProxy) -> None:
    async with queue_pool(proxy.url) as pool, asyncio.timeout(5):
        proxy.pause()
        first, second = (asyncio.ensure_future(run_script(pool, ECHO, (), (name,))) for name in "ab")
        await wait_until(lambda: proxy.accepted == 1, "the first opens")
        first.cancel()
        proxy.resume()
        assert await second == [b"b"]


async def test_a_server_that_can_not_be_reached_is_tried_once_for_all_that_wait(
    proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_queue_pool, "_CONNECT_TIMEOUT_S", 0.2)
    async with queue_pool(proxy.url) as pool:
        proxy.pause()
        waiting = [asyncio.ensure_future(run_script(pool, ECHO, (), ())) for _ in range(20)]
        errors = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(error) for error in errors} == {RedisConnectionError}
        assert proxy.accepted == 1
        proxy.resume()
        assert await run_script(pool, ECHO, (), ("x",)) == [b"x"]


async def test_whoever_stops_waiting_at_a_doorbell_takes_no_ring_away(redis_url: str, redis: Redis) -> None:
    async with queue_pool(redis_url) as pool:
        for _ in range(20):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await hear_a_ring(pool, ["bell"], within_s=30)
            await wait_until(partial(nobody_is_blocked, redis), "the server has noticed")
            await redis.execute_command("LPUSH", "bell", 1)
            async with asyncio.timeout(5):
                await hear_a_ring(pool, ["other", "bell"], within_s=30)
            assert not await redis.exists("bell")


async def nobody_is_blocked(redis: Redis) -> bool:
    return bool((await redis.info("clients"))["blocked_clients"] == 0)


async def test_a_doorbell_that_nobody_rings_is_left_in_time(redis_url: str) -> None:
    async with queue_pool(redis_url) as pool, asyncio.timeout(5):
        await hear_a_ring(pool, ["bell"], within_s=0.01)


async def test_a_doorbell_whose_connection_is_cut_is_an_error_and_the_next_wait_works(
    proxy: TcpProxy, redis: Redis
) -> None:
    async with queue_pool(proxy.url) as pool:
        waiting = asyncio.ensure_future(hear_a_ring(pool, ["bell"], within_s=30))
        await wait_until(lambda: proxy.accepted == 1, "it is connected")
        proxy.cut()
        with pytest.raises(RedisConnectionError):
            await waiting
        await redis.execute_command("LPUSH", "bell", 1)
        async with asyncio.timeout(5):
            await hear_a_ring(pool, ["bell"], within_s=30)


async def test_a_server_that_has_forgotten_its_scripts_is_told_them_again(redis_url: str, redis: Redis) -> None:
    async with queue_pool(redis_url) as pool:
        for _ in range(2):
            assert await run_script(pool, ECHO, (), ("x",)) == [b"x"]
            await redis.script_flush()
