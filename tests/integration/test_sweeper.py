"""What a crash between two systems leaves to nobody is found, and given back or ended, by whoever sweeps."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest
from redis.asyncio import Redis

from deltafan import Consumer, JobFailed, Producer, UsageRecord
from deltafan._client import RedisClient
from deltafan._errors import RedisUnavailable
from deltafan._keys import Keys
from deltafan._retention import Retention
from deltafan.testing import ScriptedUpstream
from deltafan.testing import chat as script
from deltafan_worker._sweeper import PAGE, Sweeper, SweeperOptions
from support.valkey import Valkey
from support.waiting import wait_until
from support.workers import running_worker, settings_env

HI = [{"role": "user", "content": "Hi"}]
TOOLS = {"tools": [{"type": "function", "function": {"name": "f"}}]}
QUEUE = "deltafan:queue:interactive"


@pytest.fixture
async def streams(fresh_valkey: Valkey) -> AsyncIterator[Any]:
    """The streams' own server; `redis` is the queue's."""
    async with Redis.from_url(fresh_valkey.url) as client:
        yield client


@pytest.fixture
async def producer(redis_url: str, fresh_valkey: Valkey) -> AsyncIterator[Producer]:
    async with Producer.connect(redis_url, streams_url=fresh_valkey.url) as producer:
        yield producer


@pytest.fixture
async def consumer(fresh_valkey: Valkey) -> AsyncIterator[Consumer]:
    async with Consumer.connect(fresh_valkey.url) as consumer:
        yield consumer


@pytest.fixture
def env(redis_url: str, fresh_valkey: Valkey, upstream: ScriptedUpstream, tmp_path: Path) -> dict[str, str]:
    return settings_env(redis_url, upstream.url, tmp_path, streams_url=fresh_valkey.url)


@pytest.fixture
def options(redis_url: str, fresh_valkey: Valkey) -> SweeperOptions:
    retention = Retention()
    return SweeperOptions(
        name="sweeper",
        redis_url=redis_url,
        streams_url=fresh_valkey.url,
        keys=Keys(),
        retention=retention,
        billed_ttl_ms=retention.live_ms + retention.state_ms,
    )


@pytest.fixture
def sweeper(options: SweeperOptions) -> Sweeper:
    return Sweeper(options)


async def forget(queue: Any) -> None:
    """The queue's server is back, and empty."""
    await queue.flushall()


async def ledger(queue: Any) -> list[tuple[int, str]]:
    entries = await queue.xrange("deltafan:usage")
    records = [UsageRecord.from_json(orjson.loads(fields[b"data"])) for _, fields in entries]
    return sorted((record.attempt_no, record.outcome) for record in records)


async def code_of(consumer: Consumer, job_id: str) -> str:
    with pytest.raises(JobFailed) as caught:
        await consumer.result(job_id, timeout=10)
    assert caught.value.generation.failure is not None
    return caught.value.generation.failure.code


async def status_of(streams: Any, job_id: str) -> Any:
    return await streams.hget(f"deltafan:{{{job_id}}}:state", "status")


async def test_a_submit_that_died_between_its_writes_ends_as_lost(
    producer: Producer, consumer: Consumer, sweeper: Sweeper, redis: Redis, streams: Any
) -> None:
    job = await producer.submit(model="sim", messages=HI)
    await forget(redis)
    await sweeper.sweep()
    assert await status_of(streams, job.id) == b"queued", "once is not enough: the submit may be under way"
    await sweeper.sweep()
    assert await code_of(consumer, job.id) == "lost_before_run"
    assert [fields[b"type"] for _, fields in await streams.xrange(f"deltafan:{{{job.id}}}:events")] == [b"failed"]
    assert not (await producer.submit(model="sim", messages=HI, job_id=job.id)).created


async def test_a_request_that_was_kept_is_submitted_again(
    producer: Producer, consumer: Consumer, sweeper: Sweeper, redis: Redis, env: dict[str, str]
) -> None:
    fields: dict[str, Any] = {"model": "sim", "messages": HI, "body": TOOLS, "tenant": "acme", "lane": "batch"}
    job = await producer.submit(**fields, deadline=timedelta(minutes=5))
    before = orjson.loads(await redis.get(f"arq:job:{job.id}") or b"")
    await forget(redis)
    await sweeper.sweep()
    await sweeper.sweep()
    after = orjson.loads(await redis.get(f"arq:job:{job.id}") or b"")
    deadlines = [record["k"].pop("deadline") for record in (before, after)]
    assert deadlines[0][:22] == deadlines[1][:22], "to the hundredth of a second"
    assert before["k"].pop("submitted_at_ms") < after["k"].pop("submitted_at_ms")
    assert before["k"] == after["k"]
    async with running_worker(env):
        assert (await consumer.result(job.id, timeout=10)).content == "Hello, world!"


async def test_a_refused_submits_request_is_not_taken_for_the_jobs(
    producer: Producer, consumer: Consumer, sweeper: Sweeper, redis: Redis
) -> None:
    job = await producer.submit(model="sim", messages=HI)
    with pytest.raises(Exception, match="another request"):
        await producer.submit(model="other", messages=HI, body=TOOLS, job_id=job.id)
    await forget(redis)
    await sweeper.sweep()
    await sweeper.sweep()
    assert await code_of(consumer, job.id) == "lost_before_run"


async def test_a_job_that_somebody_runs_is_left_alone_though_the_queue_is_empty(
    producer: Producer,
    consumer: Consumer,
    sweeper: Sweeper,
    redis: Redis,
    streams: Any,
    env: dict[str, str],
    upstream: ScriptedUpstream,
) -> None:
    gate = asyncio.Event()
    upstream.then([script.delta(content="Hi"), gate, *script.ending()])
    job = await producer.submit(model="sim", messages=HI)
    async with running_worker(env):
        await asyncio.wait_for(upstream.arrived.wait(), 10)
        await wait_until(lambda: _is(streams, job.id, b"running"), "it runs")
        await forget(redis)
        for _ in range(4):
            expiry = await _expiry(streams, job.id)
            await sweeper.sweep()
            await wait_until(lambda expiry=expiry: _has_moved(streams, job.id, expiry), "a heartbeat")  # type: ignore[misc]
        gate.set()
        assert (await consumer.result(job.id, timeout=10)).content == "Hi"
        await wait_until(lambda: redis.exists("deltafan:usage"), "the bill is written")
    assert await ledger(redis) == [(1, "completed")]


async def _is(streams: Any, job_id: str, status: bytes) -> bool:
    return bool(await status_of(streams, job_id) == status)


async def _expiry(streams: Any, job_id: str) -> int:
    return int(await streams.execute_command("PEXPIRETIME", f"deltafan:{{{job_id}}}:state"))


async def _has_moved(streams: Any, job_id: str, expiry: int) -> bool:
    return await _expiry(streams, job_id) > expiry + 200


async def test_a_job_whose_worker_and_queue_are_gone_ends_and_is_billed(
    producer: Producer,
    consumer: Consumer,
    sweeper: Sweeper,
    redis: Redis,
    streams: Any,
    env: dict[str, str],
    upstream: ScriptedUpstream,
) -> None:
    upstream.then([script.delta(content="half"), asyncio.Event()])
    job = await producer.submit(model="sim", messages=HI)
    async with running_worker(env):
        await asyncio.wait_for(upstream.arrived.wait(), 10)
    # Handed over, but as if its worker had died without doing so.
    await streams.hset(f"deltafan:{{{job.id}}}:state", mapping={"status": "running", "runs": 1})
    await forget(redis)
    for _ in range(6):
        await sweeper.sweep()
    assert await code_of(consumer, job.id) == "lost_in_run"
    assert await ledger(redis) == [(1, "handed_over")], "once, however often it is looked at"


async def test_a_lost_queue_entry_is_put_back(
    producer: Producer, consumer: Consumer, sweeper: Sweeper, redis: Redis, env: dict[str, str]
) -> None:
    job = await producer.submit(model="sim", messages=HI, lane="batch")
    await redis.delete("deltafan:queue:batch")
    await sweeper.sweep()
    assert not await redis.exists("deltafan:queue:batch")
    await sweeper.sweep()
    assert await redis.zrange("deltafan:queue:batch", 0, -1) == [job.id.encode()]
    async with running_worker(env):
        assert (await consumer.result(job.id, timeout=10)).content == "Hello, world!"


@pytest.mark.parametrize("record", [True, False], ids=["its record is left", "nothing is left"])
async def test_a_job_that_ended_unbilled_is_billed_once(
    record: bool,
    producer: Producer,
    consumer: Consumer,
    sweeper: Sweeper,
    redis: Redis,
    env: dict[str, str],
) -> None:
    """Its worker died between `finish` and close, and then the queue lost it."""
    job = await producer.submit(model="sim", messages=HI)
    stored = await redis.get(f"arq:job:{job.id}")
    async with running_worker(env):
        await consumer.result(job.id, timeout=10)
        await wait_until(lambda: redis.exists("deltafan:usage"), "the bill is written")
    await forget(redis)
    if record:
        await redis.set(f"arq:job:{job.id}", stored or b"", ex=600)
    for _ in range(4):
        await sweeper.sweep()
    async with running_worker(env):
        await wait_until(lambda: redis.exists("deltafan:usage"), "the bill is written again")
        if record:
            await wait_until(lambda: redis.exists(f"arq:result:{job.id}"), "arq is told as well")
    for _ in range(3):
        await sweeper.sweep()
    assert await ledger(redis) == [(1, "completed")]


async def test_an_old_job_is_not_billed_again_when_the_ledger_has_forgotten_its_calls(
    producer: Producer, consumer: Consumer, sweeper: Sweeper, redis: Redis, streams: Any, env: dict[str, str]
) -> None:
    """A job with a `ttl` of its own outlives what the ledger remembers of it."""
    job = await producer.submit(model="sim", messages=HI, ttl=timedelta(days=30))
    async with running_worker(env):
        await consumer.result(job.id, timeout=10)
        await wait_until(lambda: redis.exists(f"deltafan:billed:{job.id}"), "the bill is written")
    await redis.delete(f"deltafan:billed:{job.id}")
    await streams.hset(f"deltafan:{{{job.id}}}:state", "ended", 1)
    for _ in range(3):
        await sweeper.sweep()
    assert await ledger(redis) == [(1, "completed")]


async def test_a_deadline_passes_in_a_queue_that_nobody_serves(
    producer: Producer, consumer: Consumer, sweeper: Sweeper, redis: Redis, env: dict[str, str]
) -> None:
    job = await producer.submit(model="sim", messages=HI, deadline=timedelta(milliseconds=1))
    later = await producer.submit(model="sim", messages=HI, deadline=timedelta(minutes=1))
    await sweeper.sweep()
    assert await code_of(consumer, job.id) == "deadline_exceeded"
    assert (await consumer.snapshot(later.id)).status == "queued"
    async with running_worker(env):
        for one in (job, later):
            await wait_until(lambda one=one: redis.exists(f"arq:result:{one.id}"), "its claimant closes it")  # type: ignore[misc]
    assert await ledger(redis) == [(1, "completed")], "the later one alone"


@pytest.mark.parametrize("touch", ["renewed", "begun", "ended"])
async def test_a_job_that_is_touched_between_look_and_repair_is_left_alone(
    touch: str, producer: Producer, sweeper: Sweeper, redis: Redis, streams: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await producer.submit(model="sim", messages=HI)
    key = f"deltafan:{{{job.id}}}:state"
    await forget(redis)
    await sweeper.sweep()
    known_request = sweeper._known_request

    async def meanwhile(sight: Any) -> Any:
        if touch == "renewed":
            await streams.pexpire(key, 10**9)
        else:
            await streams.hset(key, "status", "running" if touch == "begun" else "completed")
        return await known_request(sight)

    monkeypatch.setattr(sweeper, "_known_request", meanwhile)
    await sweeper.sweep()
    assert await status_of(streams, job.id) != b"failed"
    assert not await streams.exists(f"deltafan:{{{job.id}}}:events")


async def test_one_of_many_sweeps(sweeper: Sweeper, options: SweeperOptions, redis: Redis) -> None:
    other = Sweeper(replace(options, name="other"))
    assert await sweeper.sweep()
    assert not await other.sweep()
    assert await sweeper.sweep(), "who has the lock keeps it"
    await redis.delete("deltafan:sweeper")
    assert await other.sweep()


async def test_all_jobs_are_looked_at(
    producer: Producer, sweeper: Sweeper, redis: Redis, streams: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltafan_worker._sweeper.REST", 0)
    count = 5 * PAGE
    jobs = await producer.submit_many([{"model": "sim", "messages": HI}] * count)
    await forget(redis)
    await sweeper.sweep()
    await sweeper.sweep()
    assert [await status_of(streams, job.id) for job in jobs] == [b"failed"] * count


async def end_unbilled(streams: Any, job_id: str) -> None:
    """What `finish` writes, as far as the sweeper looks at it."""
    call: dict[str, Any] = {"provider": "sim", "model": "sim", "api": "chat", "source": "none"}
    bill = UsageRecord(job_id=job_id, call_id="c", attempt=1, attempt_no=1, outcome="completed", **call)
    now_s, _ = await streams.time()
    ended = {"status": "completed", "ended": now_s * 1000, "u:c": orjson.dumps(bill.to_json())}
    await streams.hset(f"deltafan:{{{job_id}}}:state", mapping=ended)


class Dies(Exception):
    """Nothing of the sweeper's own may catch it."""


@pytest.mark.parametrize("executed", [False, True], ids=["before", "after"])
async def test_it_may_die_anywhere(
    executed: bool,
    options: SweeperOptions,
    producer: Producer,
    redis: Redis,
    streams: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At each of its round trips in turn; whoever sweeps next brings all to the same end."""
    repeat = RedisClient._repeat
    left: Iterator[int] = iter(())

    async def mortal(client: RedisClient, send: Any) -> Any:
        if next(left, None) is None:
            if executed:
                await repeat(client, send)
            raise Dies
        return await repeat(client, send)

    survived = False
    for deaths in range(1, 60):
        await redis.flushall()
        await streams.flushall()
        jobs = [await producer.submit(model="sim", messages=HI, body=body) for body in ({}, TOOLS)]
        entry = await producer.submit(model="sim", messages=HI)
        ended = await producer.submit(model="sim", messages=HI)
        await end_unbilled(streams, ended.id)
        await redis.delete(QUEUE, *[f"arq:job:{job.id}" for job in (*jobs, ended)])
        first = Sweeper(options)
        await first.sweep()
        with monkeypatch.context() as patch:
            left = iter(range(deaths))
            patch.setattr(RedisClient, "_repeat", mortal)
            try:
                await first.sweep()
                survived = True
            except Dies:
                pass
        await redis.delete("deltafan:sweeper")
        second = Sweeper(options)
        for _ in range(2):
            await second.sweep()
        assert await status_of(streams, jobs[0].id) == b"failed"
        assert len(await streams.xrange(f"deltafan:{{{jobs[0].id}}}:events")) == 1
        assert set(await redis.zrange(QUEUE, 0, -1)) == {jobs[1].id.encode(), entry.id.encode()}
        assert await redis.exists(f"arq:job:{jobs[1].id}", f"arq:job:{entry.id}") == 2
        assert await ledger(redis) == [(1, "completed")]
        if survived:
            break
    assert survived
    assert deaths > 10, "there was more than one place to die at"


async def test_a_worker_sweeps_by_itself_and_through_an_outage(
    producer: Producer, consumer: Consumer, redis: Redis, env: dict[str, str], fresh_valkey: Valkey
) -> None:
    job = await producer.submit(model="sim", messages=HI)
    await forget(redis)
    fresh_valkey.kill()
    async with running_worker({**env, "DELTAFAN_SWEEP_INTERVAL_S": "2"}):
        await wait_until(lambda: redis.keys("deltafan:worker:*"), "it runs")
        await asyncio.to_thread(fresh_valkey.start)
        assert await code_of(consumer, job.id) == "lost_before_run"


async def test_without_a_server_the_sweep_says_so(options: SweeperOptions) -> None:
    with pytest.raises(RedisUnavailable):
        await Sweeper(replace(options, streams_url="redis://127.0.0.1:1/0")).sweep()
