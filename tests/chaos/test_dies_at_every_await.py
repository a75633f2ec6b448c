"""A worker process dies exactly between two steps of a job, at each in turn: the table in ARCHITECTURE.md.

However far it came, the next worker ends the job with one whole answer, and each model call is in the ledger once.
"""

import asyncio
import signal
from collections.abc import AsyncIterator
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
from support.waiting import wait_until
from support.workers import running_worker, settings_env, worker_process

HI = [{"role": "user", "content": "Hi"}]
ANSWER = "one two three"
TERMINAL = {"completed", "failed", "cancelled"}

ONCE = [(1, "completed")]
TWICE = [(1, "lost"), (2, "completed")]
GIVEN_BACK = [(1, "completed"), (1, "handed_over")]


@dataclass
class Scene:
    """A job, its model, which holds the answer after its first delta until `go_on`, and what there is to look at."""

    job_id: str
    redis: Any
    producer: Producer
    consumer: Consumer
    upstream: ScriptedUpstream
    env: dict[str, str]
    go_on: asyncio.Event

    @property
    def events_key(self) -> str:
        return f"deltafan:{{{self.job_id}}}:events"

    async def has_published(self) -> bool:
        return bool((await self.consumer.snapshot(self.job_id)).content)

    async def ledger(self) -> list[UsageRecord]:
        entries = await self.redis.xrange("deltafan:usage")
        return [UsageRecord.from_json(orjson.loads(fields[b"data"])) for _, fields in entries]

    async def read(self) -> list[Event]:
        async with self.consumer.tail(self.job_id) as events:
            return [event async for event in events]


@pytest.fixture
def model() -> str:
    return "sim"


@pytest.fixture
async def scene(
    redis: Redis,
    redis_url: str,
    producer: Producer,
    consumer: Consumer,
    upstream: ScriptedUpstream,
    tmp_path: Path,
    model: str,
) -> Scene:
    go_on = asyncio.Event()
    first, *rest = [script.delta(content=text) for text in ("one ", "two ", "three")]
    upstream.standing = [first, go_on, *rest, *script.ending()]
    job = await producer.submit(model=model, messages=HI)
    env = settings_env(redis_url, upstream.url, tmp_path, lease_s=2, drain_timeout_s=0)
    return Scene(job.id, redis, producer, consumer, upstream, env, go_on)


@asynccontextmanager
async def dying(scene: Scene, point: str) -> AsyncIterator[Any]:
    """A worker that dies at the point, which it must have reached at the end of the block."""
    with worker_process(scene.env, dies=point) as process:
        yield process
        assert await asyncio.to_thread(process.wait, 20) == -signal.SIGKILL, "it came to the point"


async def check(scene: Scene, ledger: list[tuple[int, str]], calls: int) -> None:
    """The whole story, with this ledger and so many calls."""
    assert await ending(scene) == (ledger, calls)


async def ending(scene: Scene) -> tuple[list[tuple[int, str]], int]:
    """Another worker ends the job; a reader that was there all the time and one that comes late see one answer."""
    scene.go_on.set()
    watching = asyncio.create_task(scene.read())
    async with running_worker(scene.env):
        seen = await asyncio.wait_for(watching, 30)
        await wait_until(lambda: scene.redis.exists(f"arq:result:{scene.job_id}"), "arq knows")
    for events in (seen, await scene.read()):
        assert (fold(events).status, fold(events).content) == ("completed", ANSWER)
    assert (await scene.consumer.result(scene.job_id, timeout=5)).content == ANSWER
    types = [fields[b"type"].decode() for _, fields in await scene.redis.xrange(scene.events_key)]
    assert [kind for kind in types if kind in TERMINAL] == ["completed"], "one end"
    assert types[-1] == "completed", "and nothing behind it"
    records = await scene.ledger()
    assert len({record.call_id for record in records}) == len(records)
    left = await scene.redis.keys(f"arq:*:{scene.job_id}")
    assert left == [f"arq:result:{scene.job_id}".encode()], "the queue is tidy"
    queue = "deltafan:queue:interactive"
    assert not await scene.redis.exists(
        queue, f"{queue}:lots", f"{queue}:lot:other/one", f"{queue}:lot:other/one:tokens"
    )
    await wait_until(lambda: is_free(scene), "and nothing holds a place within the limits")
    return sorted((record.attempt_no, record.outcome) for record in records), len(scene.upstream.requests)


async def is_free(scene: Scene) -> bool:
    return all(limit.running == 0 for limit in await scene.producer.limits())


@pytest.mark.parametrize(
    ("point", "ledger", "calls"),
    [
        ("after:claim", ONCE, 1),
        ("before:begin", ONCE, 1),
        ("after:begin", TWICE, 1),  # the bill of a call that may have been made
        ("after:append", TWICE, 2),
        ("before:finish", TWICE, 2),
        ("after:finish", ONCE, 1),
        ("before:close", ONCE, 1),
        ("after:close", ONCE, 1),
    ],
)
async def test_on_the_straight_way(point: str, ledger: list[tuple[int, str]], calls: int, scene: Scene) -> None:
    async with dying(scene, point):
        scene.go_on.set()
    await check(scene, ledger, calls)


@pytest.mark.parametrize(
    ("point", "ledger"),
    [
        ("before:hand_over", TWICE),
        ("after:hand_over", GIVEN_BACK),
        ("before:release", GIVEN_BACK),
        ("after:release", GIVEN_BACK),
    ],
)
async def test_in_a_hand_over(point: str, ledger: list[tuple[int, str]], scene: Scene) -> None:
    async with dying(scene, point) as process:
        await wait_until(scene.has_published, "it is in mid-answer")
        process.terminate()
    await check(scene, ledger, 2)


@pytest.mark.parametrize("point", ["before:compare", "after:compare"])
async def test_in_a_compare(point: str, scene: Scene) -> None:
    async with dying(scene, point):
        await wait_until(scene.has_published, "it is in mid-answer")
        await scene.redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    await check(scene, TWICE, 2)


@pytest.mark.parametrize("point", ["before:compare", "after:compare", "before:replay", "after:replay"])
async def test_in_a_replay(point: str, scene: Scene) -> None:
    """The server has lost the stream; the run holds it in memory, until that is gone as well."""
    async with dying(scene, point):
        await wait_until(scene.has_published, "it is in mid-answer")
        await scene.redis.delete(scene.events_key)
        scene.go_on.set()
    await check(scene, TWICE, 2)


@pytest.mark.parametrize("model", ["one"])
@pytest.mark.parametrize("point", ["before:ask", "after:ask"])
async def test_asking_for_a_call_within_a_limit(point: str, scene: Scene) -> None:
    async with dying(scene, point):
        scene.go_on.set()
    await check(scene, ONCE, 1)


@pytest.mark.parametrize("model", ["one"])
@pytest.mark.parametrize("point", ["before:park", "after:park"])
async def test_stepping_back_from_a_limit(point: str, scene: Scene) -> None:
    """Another job has the only place."""
    await scene.redis.sadd("deltafan:limit:other/one:running", "another")
    await scene.redis.pexpire("deltafan:limit:other/one:running", 3_600_000)
    await scene.redis.psetex("arq:in-progress:another", 4000, "somebody")
    async with dying(scene, point):
        scene.go_on.set()
    assert scene.upstream.requests == []
    await check(scene, ONCE, 1)


@pytest.mark.parametrize("model", ["one"])
@pytest.mark.parametrize("point", ["before:settle", "after:settle"])
async def test_telling_what_a_call_used(point: str, scene: Scene) -> None:
    """It is told beside the end of the job, which may be written before or never."""
    async with dying(scene, point):
        scene.go_on.set()
    assert await ending(scene) in ((ONCE, 1), (TWICE, 2))


@pytest.mark.parametrize("point", ["before:refuse", "after:refuse"])
async def test_telling_of_a_refusal(point: str, scene: Scene) -> None:
    scene.upstream.then(script.refusal("rate_limit_exceeded", "too fast", 429))
    async with dying(scene, point):
        scene.go_on.set()
    await check(scene, TWICE, 2)
