"""A worker process dies, stops or is told to stop exactly between two steps of a job, at each in turn: the table in
ARCHITECTURE.md.

However far it came, the next worker ends the job with one whole answer, and each model call is in the ledger once.
"""

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import orjson
import pytest
from redis.asyncio import Redis

from deltafan import Consumer, Event, Generation, Producer, UsageRecord, fold
from deltafan.testing import Answer, ScriptedUpstream, Text
from deltafan.testing import chat as script
from support.waiting import wait_until
from support.workers import running_worker, settings_env, worker_process

HI = [{"role": "user", "content": "Hi"}]
FIRST, REST = Text("one "), [Text("two "), Text("three")]
ANSWER = "one two three"
TERMINAL = {"completed", "failed", "cancelled"}

# What a job may ask for.
PLAIN = {"model": "sim"}
LIMITED = {"model": "one"}
CONTINUED = {"model": "partial/x", "on_interrupt": "continue"}
IN_BACKGROUND = {"model": "background/x", "api": "responses", "on_interrupt": "continue"}

ONCE = [(1, "completed")]
TWICE = [(1, "lost"), (2, "completed")]
GIVEN_BACK = [(1, "completed"), (1, "handed_over")]
CANCELLED = [(1, "cancelled")]

Told: TypeAlias = tuple[list[tuple[int, str]], int]
"""The ledger's attempts and outcomes, and how many requests the provider got."""


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
def asked() -> dict[str, Any]:
    return PLAIN


@pytest.fixture
async def scene(
    redis: Redis,
    redis_url: str,
    producer: Producer,
    consumer: Consumer,
    upstream: ScriptedUpstream,
    tmp_path: Path,
    asked: dict[str, Any],
) -> Scene:
    go_on = asyncio.Event()
    upstream.standing = Answer([FIRST, go_on, *REST])
    job = await producer.submit(messages=HI, **asked)
    env = settings_env(redis_url, upstream.url, tmp_path, lease_s=2, drain_timeout_s=0)
    return Scene(job.id, redis, producer, consumer, upstream, env, go_on)


@asynccontextmanager
async def dying(scene: Scene, point: str) -> AsyncIterator[Any]:
    """A worker that dies at the point, which it must have reached at the end of the block."""
    with worker_process(scene.env, at=point) as process:
        yield process
        assert await asyncio.to_thread(process.wait, 20) == -signal.SIGKILL, "it came to the point"


async def check(scene: Scene, ledger: list[tuple[int, str]], calls: int, end: str = "completed") -> None:
    """The whole story, with this ledger and so many requests."""
    assert await ending(scene, end) == (ledger, calls)


async def ending(scene: Scene, end: str = "completed") -> Told:
    """Another worker ends the job; a reader that was there all the time and one that comes late see one end."""
    scene.go_on.set()
    watching = asyncio.create_task(scene.read())
    async with running_worker(scene.env):
        seen = await asyncio.wait_for(watching, 30)
        await wait_until(lambda: scene.redis.exists(f"arq:result:{scene.job_id}"), "arq knows")
    result = Generation.from_json(orjson.loads(await scene.redis.get(f"deltafan:{{{scene.job_id}}}:result")))
    for generation in (fold(seen), fold(await scene.read()), result):
        assert generation.status == end
        assert end != "completed" or generation.content == ANSWER
    types = [fields[b"type"].decode() for _, fields in await scene.redis.xrange(scene.events_key)]
    assert [kind for kind in types if kind in TERMINAL] == [end], "one end"
    assert types[-1] == end, "and nothing behind it"
    queue = "deltafan:queue:interactive"
    lots = (f"{queue}:lots", f"{queue}:lot:other/one", f"{queue}:lot:other/one:tokens")
    assert not await scene.redis.exists(queue, "arq:abort", *lots), "the queue is tidy"
    assert await scene.redis.keys(f"arq:*:{scene.job_id}") == [f"arq:result:{scene.job_id}".encode()]
    await wait_until(lambda: is_free(scene), "and nothing holds a place within the limits")
    return await told(scene)


async def told(scene: Scene) -> Told:
    records = await scene.ledger()
    assert len({record.call_id for record in records}) == len(records)
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
    ("point", "stories"),
    [
        # How far it still comes depends on when it hears of it; a call that was given up may not have arrived.
        ("after:claim", [(ONCE, 1), (GIVEN_BACK, 1), (GIVEN_BACK, 2)]),
        ("before:begin", [(ONCE, 1), (GIVEN_BACK, 1), (GIVEN_BACK, 2)]),
        ("after:begin", [(ONCE, 1), (GIVEN_BACK, 1), (GIVEN_BACK, 2)]),
        ("after:append", [(GIVEN_BACK, 2)]),
        ("before:finish", [(ONCE, 1)]),
        ("after:finish", [(ONCE, 1)]),
        ("before:close", [(ONCE, 1)]),
        ("after:close", [(ONCE, 1)]),
    ],
)
async def test_told_to_stop_on_the_straight_way(point: str, stories: list[Told], scene: Scene) -> None:
    """SIGTERM, with no time to drain: what is ending ends, the rest is given back at once and spends no run."""
    with worker_process(scene.env, at=point, gets=signal.SIGTERM) as process:
        if point != "after:append":  # else it might be through before it hears of it
            scene.go_on.set()
        assert await asyncio.to_thread(process.wait, 20) == 0, "it came to the point, and left by itself"
    assert not await scene.redis.exists(f"arq:in-progress:{scene.job_id}"), "nobody has to wait for its lease"
    assert await ending(scene) in stories


@pytest.mark.parametrize(
    ("point", "ledger", "calls"),
    [
        ("after:claim", ONCE, {1}),
        ("before:begin", ONCE, {1}),
        ("after:begin", TWICE, {1, 2}),  # it may make its call for nothing when it wakes, paid for as the lost one
        ("after:append", TWICE, {2}),
        ("before:finish", TWICE, {2}),
        ("after:finish", ONCE, {1}),
        ("before:close", ONCE, {1}),
        ("after:close", ONCE, {1}),
    ],
)
async def test_frozen_on_the_straight_way(
    point: str, ledger: list[tuple[int, str]], calls: set[int], scene: Scene
) -> None:
    """SIGSTOP, until its lease is gone and another has ended the job; then it wakes and changes nothing."""
    with worker_process({**scene.env, "DELTAFAN_DRAIN_TIMEOUT_S": "30"}, at=point, gets=signal.SIGSTOP) as zombie:
        scene.go_on.set()
        await wait_until(lambda: is_stopped(zombie), "it came to the point")
        await ending(scene)
        before = await left_behind(scene)
        # Told to stop as well, so that it leaves as soon as it has done what it was about to do.
        zombie.terminate()
        zombie.send_signal(signal.SIGCONT)
        assert await asyncio.to_thread(zombie.wait, 20) == 0
    assert await left_behind(scene) == before
    assert fold(await scene.read()).content == ANSWER
    outcomes, requests = await told(scene)
    assert outcomes == ledger
    assert requests in calls


def is_stopped(process: "subprocess.Popen[bytes]") -> bool:
    return os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None


async def left_behind(scene: Scene) -> list[Any]:
    """All that there is of the job. Without `arq:retry`, in which arq counts what nobody reads."""
    redis, job = scene.redis, f"deltafan:{{{scene.job_id}}}"
    stored = (redis.xrange(scene.events_key), redis.hgetall(f"{job}:state"), redis.get(f"{job}:result"))
    queue = (redis.keys(name) for name in ("arq:job:*", "arq:in-progress:*", "arq:result:*", "deltafan:queue:*"))
    return [await reading for reading in (*stored, *queue, redis.xrange("deltafan:usage"))]


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


@pytest.mark.parametrize("asked", [LIMITED], ids=["limited"])
@pytest.mark.parametrize("point", ["before:ask", "after:ask"])
async def test_asking_for_a_call_within_a_limit(point: str, scene: Scene) -> None:
    async with dying(scene, point):
        scene.go_on.set()
    await check(scene, ONCE, 1)


@pytest.mark.parametrize("asked", [LIMITED], ids=["limited"])
@pytest.mark.parametrize("point", ["before:park", "after:park"])
async def test_stepping_back_from_a_limit(point: str, scene: Scene) -> None:
    await another_has_the_only_place(scene)
    async with dying(scene, point):
        scene.go_on.set()
    assert scene.upstream.requests == []
    await scene.redis.delete("arq:in-progress:another")
    await check(scene, ONCE, 1)


async def another_has_the_only_place(scene: Scene) -> None:
    await scene.redis.sadd("deltafan:limit:other/one:running", "another")
    await scene.redis.pexpire("deltafan:limit:other/one:running", 3_600_000)
    await scene.redis.psetex("arq:in-progress:another", 600_000, "somebody")


@pytest.mark.parametrize("asked", [LIMITED], ids=["limited"])
@pytest.mark.parametrize(("point", "status"), [("before:rest", b"running"), ("after:rest", b"queued")])
async def test_waiting_again_after_a_dead_worker(point: str, status: bytes, scene: Scene) -> None:
    async with dying(scene, "after:append"):
        pass
    await another_has_the_only_place(scene)
    async with dying(scene, point):
        pass
    assert await scene.redis.hget(f"deltafan:{{{scene.job_id}}}:state", "status") == status
    await scene.redis.delete("arq:in-progress:another")
    await check(scene, TWICE, 2)


@pytest.mark.parametrize("asked", [LIMITED], ids=["limited"])
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


@pytest.mark.parametrize("point", ["before:confirm", "after:confirm"])
async def test_asking_whether_the_replicas_have_the_end(point: str, scene: Scene) -> None:
    """There is none, so it is asked in vain for a bounded time."""
    scene.env |= {"DELTAFAN_REPLICAS": "1", "DELTAFAN_REPLICAS_TIMEOUT_MS": "10"}
    async with dying(scene, point):
        scene.go_on.set()
    await check(scene, ONCE, 1)


@pytest.mark.parametrize(("point", "outcome"), [("before:finish", "lost"), ("after:finish", "cancelled")])
async def test_heeding_an_abort_of_arqs(point: str, outcome: str, scene: Scene) -> None:
    async with dying(scene, point):
        await wait_until(scene.has_published, "it is in mid-answer")
        await scene.redis.zadd("arq:abort", {scene.job_id: 1})
    await check(scene, [(1, outcome)], 1, "cancelled")


@pytest.mark.parametrize("asked", [CONTINUED], ids=["continued"])
async def test_reading_what_a_dead_worker_has_left(scene: Scene) -> None:
    scene.upstream.then(Answer([FIRST, scene.go_on]))
    scene.upstream.standing = Answer(REST)
    for death in ("after:append", "after:leftover"):
        async with dying(scene, death):
            pass
    await check(scene, TWICE, 2)
    assert [event.started.mode for event in await scene.read() if event.started] == ["fresh", "continue"]


@pytest.mark.parametrize("asked", [IN_BACKGROUND], ids=["in background"])
@pytest.mark.parametrize(
    ("point", "ledger"),
    [
        ("before:note_response", TWICE),  # nobody knows of it, so another is made
        ("after:note_response", [(2, "completed")]),  # it is read on
    ],
)
async def test_noting_a_response_in_the_background(point: str, ledger: list[tuple[int, str]], scene: Scene) -> None:
    async with dying(scene, point):
        pass
    await check(scene, ledger, 2)


@pytest.mark.parametrize("asked", [IN_BACKGROUND], ids=["in background"])
@pytest.mark.parametrize(("point", "requests"), [("before:tell", 2), ("after:tell", 3)])
async def test_ending_a_response_that_nobody_will_read(point: str, requests: int, scene: Scene) -> None:
    """Between `finish` and close: the provider is told by the next worker, perhaps once more."""
    async with dying(scene, point):
        await wait_until(scene.has_published, "it is in mid-answer")
        await scene.producer.cancel(scene.job_id)
    await check(scene, CANCELLED, requests, "cancelled")
    assert scene.upstream.requests[-1].path.endswith("/cancel")
