"""The server fails under a running generation: every reader still ends with the whole answer, paid for once."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest
from redis.asyncio import Redis

from deltafan import Consumer, Event, Producer, UsageRecord, fold
from deltafan.testing import ScriptedUpstream
from deltafan.testing import chat as script
from support.valkey import Valkey
from support.waiting import wait_until
from support.workers import running_worker, settings_env

HI = [{"role": "user", "content": "Hi"}]
FIRST, SECOND = [f"a{n} " for n in range(20)], [f"b{n} " for n in range(20)]
ANSWER = "".join(FIRST + SECOND)


@dataclass
class Scene:
    """A generation that has published its first half and waits for `go_on`; a reader has seen that half."""

    valkey: Valkey
    redis: Redis
    job_id: str
    go_on: asyncio.Event
    reading: "asyncio.Task[list[Event]]"
    consumer: Consumer

    @property
    def events_key(self) -> str:
        return f"deltafan:{{{self.job_id}}}:events"

    @property
    def state_key(self) -> str:
        return f"deltafan:{{{self.job_id}}}:state"


@asynccontextmanager
async def half_way(
    valkey: Valkey, upstream: ScriptedUpstream, folder: Path, end: asyncio.Event | None = None
) -> AsyncIterator[Scene]:
    gate = asyncio.Event()
    held = [end] if end is not None else []
    halves = [[script.delta(content=piece) for piece in half] for half in (FIRST, SECOND)]
    upstream.then([*halves[0], gate, *halves[1], *held, *script.ending()])
    redis: Redis = Redis.from_url(valkey.url)
    env = settings_env(valkey.url, upstream.url, folder)
    async with (
        Producer.connect(valkey.url) as producer,
        Consumer.connect(valkey.url) as consumer,
        running_worker(env),
    ):
        job = await producer.submit(model="sim", messages=HI)
        seen: list[Event] = []

        async def read() -> list[Event]:
            async with consumer.tail(job.id) as events:
                async for event in events:
                    seen.append(event)
            return seen

        reading = asyncio.create_task(read())
        await wait_until(lambda: len(seen) == 21, "the first half has been read")
        try:
            yield Scene(valkey, redis, job.id, gate, reading, consumer)
        finally:
            gate.set()
            reading.cancel()
            await redis.aclose()


async def connections_are_killed(scene: Scene) -> None:
    await scene.redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    scene.go_on.set()


async def the_server_is_restarted_with_its_data(scene: Scene) -> None:
    scene.valkey.kill()
    scene.go_on.set()
    await asyncio.to_thread(scene.valkey.start)


async def the_stream_is_deleted(scene: Scene) -> None:
    await scene.redis.delete(scene.events_key)
    scene.go_on.set()


async def stream_and_state_are_deleted(scene: Scene) -> None:
    await scene.redis.delete(scene.events_key, scene.state_key)
    scene.go_on.set()


async def the_state_alone_is_deleted(scene: Scene) -> None:
    await scene.redis.delete(scene.state_key)
    scene.go_on.set()


async def an_entry_is_lost_from_the_middle(scene: Scene) -> None:
    entries = await scene.redis.xrange(scene.events_key)
    await scene.redis.xdel(scene.events_key, entries[10][0])
    scene.go_on.set()


async def the_suffix_is_lost_as_in_a_failover(scene: Scene) -> None:
    await _lose_suffix(scene)
    scene.go_on.set()


async def _lose_suffix(scene: Scene) -> None:
    """The second half of what is there, and with it all connections."""
    entries = await scene.redis.xrange(scene.events_key)
    kept = await scene.redis.xrange(scene.events_key, max=entries[10][0])
    await scene.redis.delete(scene.events_key)
    for entry_id, fields in kept:
        await scene.redis.xadd(scene.events_key, fields, id=entry_id)
    await scene.redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


async def memory_runs_out_for_a_while(scene: Scene) -> None:
    await scene.redis.config_set("maxmemory", "1")
    scene.go_on.set()
    stats = "errorstats"
    await wait_until(lambda: _refusals(scene.redis, stats), "a write has been refused")
    await scene.redis.config_set("maxmemory", "0")


async def _refusals(redis: Redis, section: str) -> bool:
    return "errorstat_OOM" in await redis.info(section)


async def scripts_are_flushed(scene: Scene) -> None:
    await scene.redis.script_flush()
    scene.go_on.set()


async def the_server_is_paused(scene: Scene) -> None:
    scene.valkey.pause()
    scene.go_on.set()
    await wait_until(_ticks(300), "the server was away for some heartbeats")
    scene.valkey.resume()


def _ticks(count: int) -> Callable[[], bool]:
    left = iter(range(count))
    return lambda: next(left, None) is None


FAULTS = [
    connections_are_killed,
    the_server_is_restarted_with_its_data,
    the_stream_is_deleted,
    stream_and_state_are_deleted,
    the_state_alone_is_deleted,
    an_entry_is_lost_from_the_middle,
    the_suffix_is_lost_as_in_a_failover,
    memory_runs_out_for_a_while,
    scripts_are_flushed,
    the_server_is_paused,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
async def test_the_answer_survives_when(
    fault: Callable[[Scene], Awaitable[None]], fresh_valkey: Valkey, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    async with half_way(fresh_valkey, upstream, tmp_path) as scene:
        await fault(scene)
        events = await asyncio.wait_for(scene.reading, 40)
        assert fold(events).content == ANSWER, "a reader that was there all the time"
        assert fold(await _read(scene)).content == ANSWER, "one that comes afterwards"
        assert (await scene.consumer.result(scene.job_id, timeout=10)).content == ANSWER
        assert len(upstream.requests) == 1, "the model was called once"
        await wait_until(lambda: scene.redis.exists("deltafan:usage"), "the bill is written")
        await wait_until(lambda: scene.redis.exists(f"arq:result:{scene.job_id}"), "arq knows")
        assert [record.outcome for record in await _ledger(scene.redis)] == ["completed"]


async def _read(scene: Scene) -> list[Event]:
    async with scene.consumer.tail(scene.job_id) as events:
        return [event async for event in events]


async def _ledger(redis: Redis) -> list[UsageRecord]:
    entries = await redis.xrange("deltafan:usage")
    return [UsageRecord.from_json(orjson.loads(fields[b"data"])) for _, fields in entries]


async def test_readers_get_on_long_before_the_end(
    fresh_valkey: Valkey, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    """A refused append is noticed by its own reply, not only when the job is to be finished."""
    end = asyncio.Event()
    async with half_way(fresh_valkey, upstream, tmp_path, end) as scene:
        await the_stream_is_deleted(scene)
        await wait_until(lambda: _has_all(scene), "all text is in the stream while the model still holds the end")
        assert not scene.reading.done()
        end.set()
        assert fold(await asyncio.wait_for(scene.reading, 20)).content == ANSWER


async def test_nothing_is_appended_on_a_new_connection_before_the_stream_is_mended(
    fresh_valkey: Valkey, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    """The server would take it, and no reader would get past the hole before it."""
    end = asyncio.Event()
    async with half_way(fresh_valkey, upstream, tmp_path, end) as scene:
        last = await _publishers(scene.redis)
        await _lose_suffix(scene)
        await wait_until(lambda: _has_another(scene.redis, last), "the worker has a new connection")
        scene.go_on.set()
        await wait_until(lambda: _has_all(scene), "all text is in the stream while the model still holds the end")
        assert not scene.reading.done()
        end.set()
        events = await asyncio.wait_for(scene.reading, 20)
        assert fold(events).content == ANSWER
        assert [event.type for event in events].count("started") == 1, "it was mended in place"


async def _publishers(redis: Any) -> set[str]:
    return {client["id"] for client in await redis.client_list() if client["name"] == "deltafan-publisher"}


async def _has_another(redis: Any, last: set[str]) -> bool:
    return bool(await _publishers(redis) - last)


async def _has_all(scene: Scene) -> bool:
    return (await scene.consumer.snapshot(scene.job_id)).content == ANSWER


async def test_a_job_that_ends_during_an_outage_is_finished_afterwards(
    fresh_valkey: Valkey, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    async with half_way(fresh_valkey, upstream, tmp_path) as scene:
        fresh_valkey.kill()
        scene.go_on.set()
        await asyncio.wait_for(upstream.requests[0].ended.wait(), 10)
        await asyncio.to_thread(fresh_valkey.start)
        assert fold(await asyncio.wait_for(scene.reading, 30)).content == ANSWER
        assert len(upstream.requests) == 1


async def test_a_worker_waits_for_a_server_that_is_not_there_yet(
    fresh_valkey: Valkey, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    env = settings_env(fresh_valkey.url, upstream.url, tmp_path)
    async with Producer.connect(fresh_valkey.url) as producer:
        job = await producer.submit(model="sim", messages=HI)
    fresh_valkey.kill()
    async with running_worker(env):
        await asyncio.to_thread(fresh_valkey.start)
        async with Consumer.connect(fresh_valkey.url) as consumer:
            assert (await consumer.result(job.id, timeout=20)).content == "Hello, world!"
