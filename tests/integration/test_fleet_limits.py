"""The limits of providers, kept by all workers together: who must wait waits in line, and loses nothing."""

import asyncio
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest
from arq.connections import ArqRedis
from arq.jobs import Job as ArqJob
from arq.jobs import JobStatus
from redis.asyncio import Redis

from deltafan import Consumer, JobCancelled, JobFailed, Limit, Producer, ResultTimeout, UsageRecord
from deltafan._background import background
from deltafan.testing import ScriptedUpstream
from deltafan.testing import chat as script
from deltafan_config import load_settings
from deltafan_worker._leased import LeasedWorker
from deltafan_worker._limits import FleetLimits, Grant, Used
from deltafan_worker.main import open_worker
from deltafan_worker.serialization import deserialize
from support.limits import pass_time
from support.proxy import tcp_proxy
from support.valkey import Valkey
from support.waiting import wait_until
from support.workers import running_worker, settings_env, worker_process

HI = [{"role": "user", "content": "Hi"}]
NO_MONEY = script.refusal("insufficient_quota", "You exceeded your current quota, check your billing", 429)
TOO_FAST = script.refusal("rate_limit_exceeded", "too fast", 429)


async def ledger(redis: Redis) -> list[tuple[int, str]]:
    entries = await redis.xrange("deltafan:usage")
    records = [UsageRecord.from_json(orjson.loads(fields[b"data"])) for _, fields in entries]
    return [(record.attempt_no, record.outcome) for record in records]


async def limit_of(producer: Producer, name: str) -> Limit:
    return next(limit for limit in await producer.limits() if limit.name == name)


async def submit(producer: Producer, count: int, model: str, **fields: Any) -> list[str]:
    requests = [{"model": model, "messages": HI, **fields} for _ in range(count)]
    return [job.id for job in await producer.submit_many(requests)]


async def wait_for_lot(producer: Producer, name: str, lane: str, count: int) -> None:
    async def is_so() -> bool:
        known = {limit.name: limit.waiting[lane] for limit in await producer.limits()}
        return known.get(name) == count

    await wait_until(is_so, f"{count} jobs wait for {name}")


async def whole_answers(consumer: Consumer, ids: list[str]) -> None:
    results = await asyncio.gather(*[consumer.result(job_id, timeout=20) for job_id in ids])
    assert {result.content for result in results} == {"Hello, world!"}


async def let_time_pass_until_ended(redis: Redis, count: int) -> None:
    async def have_ended() -> bool:
        await pass_time(redis, 2)
        return len(await redis.keys("arq:result:*")) == count

    await wait_until(have_ended, f"{count} jobs have ended")


@pytest.mark.parametrize(("lane", "at_once"), [("interactive", 3), ("batch", 1)])
async def test_who_must_wait_holds_no_slot_and_begins_no_attempt(
    lane: str, at_once: int, producer: Producer, consumer: Consumer, worker: LeasedWorker, redis: Redis
) -> None:
    """Interactive jobs may use a minute's calls at once; batch jobs are spread over it."""
    ids = await submit(producer, 5, "narrow/m", lane=lane)
    await wait_for_lot(producer, "narrow/m", lane, 5 - at_once)
    await wait_until(lambda: not worker.tasks, "those that had room have ended")
    ended = [job_id for job_id in ids if await redis.exists(f"deltafan:{{{job_id}}}:events")]
    assert len(ended) == at_once, "no attempt was begun of the others"
    queue = f"deltafan:queue:{lane}"
    for job_id in set(ids) - set(ended):
        arq_job = ArqJob(job_id, ArqRedis(redis.connection_pool), queue, _deserializer=deserialize)
        assert await arq_job.status() is JobStatus.deferred
    await let_time_pass_until_ended(redis, 5)
    await whole_answers(consumer, ids)
    assert await ledger(redis) == [(1, "completed")] * 5
    assert not await redis.exists(f"{queue}:lots", f"{queue}:lot:narrow/m", f"{queue}:lot:narrow/m:tokens")


async def test_tokens_are_counted_as_the_provider_counts_them(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream, redis: Redis
) -> None:
    usage = {"prompt_tokens": 100, "completion_tokens": 300, "total_tokens": 400}
    upstream.standing = script.text("Hello, ", "world!", usage=usage)
    (first,) = await submit(producer, 1, "tokens")
    await consumer.result(first, timeout=10)
    await wait_until(lambda: _uses(producer, "other/tokens", 400), "the estimate is corrected")
    ids = await submit(producer, 3, "tokens")
    await wait_for_lot(producer, "other/tokens", "interactive", 2)
    await let_time_pass_until_ended(redis, 4)
    await whole_answers(consumer, ids)


async def _uses(producer: Producer, name: str, tokens: int) -> bool:
    return (await limit_of(producer, name)).tokens == tokens


async def test_a_call_that_was_refused_has_used_its_input_at_most_and_holds_nobody_up(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream
) -> None:
    upstream.then(script.refusal("invalid_prompt", "no", 400))
    (refused,) = await submit(producer, 1, "tokens")
    with pytest.raises(JobFailed):
        await consumer.result(refused, timeout=10)
    await whole_answers(consumer, await submit(producer, 1, "tokens"))


async def test_rows_that_are_cancelled_in_line_use_nothing_of_the_limit(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream
) -> None:
    ids = await submit(producer, 20, "narrow/m", lane="batch")
    await wait_for_lot(producer, "narrow/m", "batch", 19)
    for job_id in ids:
        await producer.cancel(job_id)
    await whole_answers(consumer, await submit(producer, 1, "narrow/m", lane="batch"))
    assert len(upstream.requests) == 2


async def test_no_more_run_at_once_than_allowed_and_the_next_starts_when_one_ends(
    producer: Producer, consumer: Consumer, env: dict[str, str], upstream: ScriptedUpstream
) -> None:
    gates = [asyncio.Event() for _ in range(3)]
    for gate in gates:
        upstream.then([script.delta(content="Hello, "), gate, script.delta(content="world!"), *script.ending()])
    async with running_worker(env), running_worker(env):
        ids = await submit(producer, 3, "one", lane="batch")
        for index, gate in enumerate(gates):
            await wait_until(lambda index=index: len(upstream.requests) == index + 1, "the next is called")  # type: ignore[misc]
            await wait_for_lot(producer, "other/one", "batch", 2 - index)
            assert (await limit_of(producer, "other/one")).running == 1
            freed = time.monotonic()
            gate.set()
        assert time.monotonic() - freed < 5
        await whole_answers(consumer, ids)
        await wait_until(lambda: _runs(producer, 0), "the place is free")


async def _runs(producer: Producer, count: int) -> bool:
    return (await limit_of(producer, "other/one")).running == count


async def test_the_place_of_a_worker_that_died_is_found_free(
    producer: Producer, consumer: Consumer, upstream: ScriptedUpstream, redis_url: str, tmp_path: Path
) -> None:
    env = settings_env(redis_url, upstream.url, tmp_path, lease_s=2)
    upstream.then([script.delta(content="Hello, "), asyncio.Event()])
    with worker_process(env) as process:
        (held,) = await submit(producer, 1, "one")
        await wait_until(lambda: len(upstream.requests) == 1, "it runs")
        process.kill()
        await producer.cancel(held)
    async with running_worker(env):
        await whole_answers(consumer, await submit(producer, 2, "one"))


async def test_a_worker_that_stops_has_told_what_its_calls_used(
    producer: Producer, consumer: Consumer, env: dict[str, str]
) -> None:
    async with open_worker(load_settings(env), env) as worker:
        async with background(worker.main(), "worker"):
            (held,) = await submit(producer, 1, "one")
            await consumer.result(held, timeout=10)
            await wait_until(lambda: _runs(producer, 0), "the call is over")
            before = (await limit_of(producer, "other/one")).tokens
        now = int(time.time())
        grant = Grant(group="other/one", second=now, tokens=0, number="1")
        worker.limits.settle(grant, "another", Used(123, None, answered=True))
    assert (await limit_of(producer, "other/one")).tokens == before + 123


async def test_another_provider_with_room_is_asked_instead(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, redis: Redis
) -> None:
    ids = await submit(producer, 5, "roomy")
    await whole_answers(consumer, ids)
    usage = [(await consumer.result(job_id)).usage for job_id in ids]
    assert sorted(record.provider for record in usage if record) == ["narrow"] * 3 + ["other"] * 2


async def test_a_refusal_for_being_too_fast_defers_a_batch_job_and_costs_it_no_attempt(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream, redis: Redis
) -> None:
    for _ in range(4):  # more often than an interactive job would try
        upstream.then(script.Refuse(429, TOO_FAST.body, {"retry-after": "0.2"}))
    ids = await submit(producer, 1, "other/m", lane="batch")
    await let_time_pass_until_ended(redis, 1)
    await whole_answers(consumer, ids)
    assert await ledger(redis) == [(1, "completed")]
    assert len(upstream.requests) == 5


async def test_a_row_that_fails_and_finds_no_room_to_try_again_fails_as_it_did(
    producer: Producer,
    consumer: Consumer,
    redis: Redis,
    env: dict[str, str],
    upstream: ScriptedUpstream,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deltafan_worker._admission.LONGEST_WAIT_S", 1.0)
    upstream.standing = script.refusal("server_error", "this prompt breaks us", 500)
    async with running_worker(env):
        (job_id,) = await submit(producer, 1, "narrow/m", lane="batch")
        with pytest.raises(JobFailed, match="breaks us"):
            await consumer.result(job_id, timeout=20)
        await wait_until(lambda: redis.exists("deltafan:usage"), "the bill is written")
    assert len(upstream.requests) == 1
    assert await ledger(redis) == [(1, "failed")]


async def test_a_row_whose_first_provider_fails_waits_in_line_for_the_second(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream, redis: Redis
) -> None:
    await whole_answers(consumer, await submit(producer, 1, "narrow/m", lane="batch"))
    upstream.then(script.refusal("invalid_api_key", "who are you?", 401))
    ids = await submit(producer, 1, "second", lane="batch")
    await wait_for_lot(producer, "narrow/second", "batch", 1)
    await let_time_pass_until_ended(redis, 2)
    await whole_answers(consumer, ids)
    assert len(upstream.requests) == 3


async def test_room_that_was_found_before_a_cool_down_is_asked_for_again_after_it(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream, redis: Redis
) -> None:
    """It may outlast the minute in which the calls were counted."""
    await redis.set("deltafan:cooldown:narrow/m", "1", px=3000)
    ids = await submit(producer, 3, "narrow/m")
    await wait_until(lambda: _asked_for(producer, 3), "all three have found room, and wait for the cool-down's end")
    await pass_time(redis, 62)
    seconds, _ = await redis.time()
    await redis.execute_command("HINCRBY", "deltafan:limit:narrow", f"r{seconds + 2}", 3)  # another worker's calls
    ends = await asyncio.gather(*[consumer.result(job_id, timeout=6) for job_id in ids], return_exceptions=True)
    assert [type(end) for end in ends] == [ResultTimeout] * 3
    assert upstream.requests == []
    await pass_time(redis, 62)
    await whole_answers(consumer, ids)


async def _asked_for(producer: Producer, calls: int) -> bool:
    return any(limit.requests == calls for limit in await producer.limits() if limit.name == "narrow/m")


async def test_refusals_shrink_the_rate_for_everyone_for_a_while(
    producer: Producer,
    consumer: Consumer,
    worker: LeasedWorker,
    upstream: ScriptedUpstream,
    redis: Redis,
    env: dict[str, str],
) -> None:
    upstream.standing = TOO_FAST
    await submit(producer, 1, "other/m", lane="batch")
    await wait_for_lot(producer, "other/m", "batch", 1)
    upstream.standing = script.text("Hello, ", "world!")
    await let_time_pass_until_ended(redis, 1)
    await whole_answers(consumer, await submit(producer, 30, "other/m"))
    await pass_time(redis, 6)
    upstream.standing = TOO_FAST
    await submit(producer, 1, "other/m", lane="batch")
    await wait_until(lambda: redis.hexists("deltafan:limit:other/m", "learned"), "the rate is learned")
    learned = float(await redis.execute_command("HGET", "deltafan:limit:other/m", "learned"))
    assert 0.7 * 30 <= learned < 12 * 31
    assert await redis.exists("deltafan:limit"), "every worker asks before each call"


async def test_a_learned_rate_holds_for_batch_jobs_and_wears_off(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, redis: Redis
) -> None:
    now_ms = int((await redis.time())[0] * 1000)
    await redis.execute_command("SET", "deltafan:limit", now_ms, "PX", 600_000)
    await redis.execute_command("HSET", "deltafan:limit:other/m", "learned", 30, "learned_ms", now_ms)
    await redis.execute_command("SADD", "deltafan:limits", "other/m")
    await redis.execute_command("PEXPIRE", "deltafan:limits", 600_000)
    batch = await submit(producer, 10, "other/m", lane="batch")
    await wait_for_lot(producer, "other/m", "batch", 7)
    await whole_answers(consumer, await submit(producer, 10, "other/m"))
    assert (await limit_of(producer, "other/m")).waiting["batch"] >= 6, "nobody waits for interactive jobs"
    await let_time_pass_until_ended(redis, 20)
    await whole_answers(consumer, batch)


async def test_one_refusal_among_the_first_calls_holds_up_nobody_who_is_waited_for(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream
) -> None:
    upstream.then(*[script.Refuse(429, TOO_FAST.body, {"retry-after": "0.05"})] * 3)
    ids = await submit(producer, 100, "other/m")
    await asyncio.wait_for(whole_answers(consumer, ids), 15)


async def test_without_money_batch_jobs_wait_and_interactive_ones_are_told(
    producer: Producer, consumer: Consumer, env: dict[str, str], upstream: ScriptedUpstream, redis: Redis
) -> None:
    upstream.standing = NO_MONEY
    async with running_worker(env | {"DELTAFAN_QUOTA_PAUSE_S": "30"}) as worker:
        ids = await submit(producer, 3, "other/m", lane="batch")
        await wait_for_lot(producer, "other/m", "batch", 3)
        await worker.limits.told()
        limit = await limit_of(producer, "other")
        assert limit.reason is not None
        assert "exceeded your current quota" in limit.reason
        assert 20 < limit.closed_s <= 30
        asked = len(upstream.requests)
        (urgent,) = await submit(producer, 1, "other/m")
        with pytest.raises(JobFailed) as caught:
            await consumer.result(urgent, timeout=10)
        assert caught.value.generation.failure is not None
        assert caught.value.generation.failure.code == "insufficient_quota"
        assert len(upstream.requests) == asked + 1
        upstream.standing = script.text("Hello, ", "world!")
        await let_time_pass_until_ended(redis, 4)
        await whole_answers(consumer, ids)
        assert (await limit_of(producer, "other")).reason is None
    assert sorted(await ledger(redis)) == [(1, "completed")] * 3 + [(1, "failed")]


async def test_a_model_without_free_tokens_pauses_alone(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream, redis: Redis
) -> None:
    upstream.then(script.refusal("AllocationQuota.FreeTierOnly", "The free tier of the model has been exhausted", 403))
    ids = await submit(producer, 1, "other/used-up", lane="batch")
    await wait_for_lot(producer, "other/used-up", "batch", 1)
    await wait_until(lambda: redis.hexists("deltafan:limit:other/used-up", "quota"), "it is told")
    await whole_answers(consumer, await submit(producer, 3, "other/m", lane="batch"))
    limit = await limit_of(producer, "other/used-up")
    assert (limit.reason, limit.closed_s > 0, limit.waiting["batch"]) == (
        "AllocationQuota.FreeTierOnly: The free tier of the model has been exhausted",
        True,
        1,
    )
    await pass_time(redis, 61)
    await whole_answers(consumer, ids)


async def test_after_a_pause_one_job_tries_before_the_others(
    producer: Producer, env: dict[str, str], upstream: ScriptedUpstream, redis: Redis
) -> None:
    upstream.standing = NO_MONEY
    async with running_worker(env | {"DELTAFAN_QUOTA_PAUSE_S": "30"}) as worker:
        await submit(producer, 20, "other/m", lane="batch")
        await wait_for_lot(producer, "other/m", "batch", 20)
        await worker.limits.told()  # a refusal that is told later closes the provider anew
        asked = len(upstream.requests)
        await pass_time(redis, 31)
        await wait_until(lambda: len(upstream.requests) > asked, "one tries")
        await wait_for_lot(producer, "other/m", "batch", 20)
        assert len(upstream.requests) == asked + 1


async def test_rows_of_a_cancelled_batch_that_wait_for_money_do_not_try_it_one_by_one(
    producer: Producer,
    env: dict[str, str],
    upstream: ScriptedUpstream,
    redis: Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deltafan_worker._batch_cancels._LOOK_S", 0)
    upstream.standing = NO_MONEY
    async with running_worker(env | {"DELTAFAN_QUOTA_PAUSE_S": "30"}) as worker:
        await producer.report_batch("b", {"status": "running"}, is_first=True)
        await submit(producer, 20, "other/m", lane="batch", metadata={"batch": "b"})
        await wait_for_lot(producer, "other/m", "batch", 20)
        await worker.limits.told()
        asked = len(upstream.requests)
        await producer.cancel_batch("b")
        await pass_time(redis, 31)
        await wait_until(lambda: _has_ended(redis, 20), "all have ended")
        assert len(upstream.requests) == asked


async def _has_ended(redis: Redis, count: int) -> bool:
    return len(await redis.keys("arq:result:*")) == count


async def test_a_job_that_waits_can_be_cancelled_and_heeds_its_deadline(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, redis: Redis
) -> None:
    await whole_answers(consumer, await submit(producer, 3, "narrow/m"))
    cancelled, late = (
        await submit(producer, 1, "narrow/m"),
        await submit(producer, 1, "narrow/m", deadline=timedelta(seconds=1.5)),
    )
    await wait_for_lot(producer, "narrow/m", "interactive", 2)
    assert await producer.cancel(cancelled[0]) == "cancelled"
    with pytest.raises(JobCancelled):
        await consumer.result(cancelled[0], timeout=5)
    with pytest.raises(JobFailed, match="deadline"):
        await consumer.result(late[0], timeout=10)
    await let_time_pass_until_ended(redis, 5)


async def test_an_abort_that_arrives_while_a_job_asks_for_room_ends_it(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    await whole_answers(consumer, await submit(producer, 3, "narrow/m"))
    ask, asked = FleetLimits.ask, asyncio.Event()

    async def slow(self: FleetLimits, *args: Any, **options: Any) -> Any:
        asked.set()
        await wait_until(lambda: args[2] in worker.aborting_tasks, "the heartbeat has seen the abort")
        return await ask(self, *args, **options)

    monkeypatch.setattr(FleetLimits, "ask", slow)
    (late,) = await submit(producer, 1, "narrow/m")
    await asked.wait()
    await redis.zadd("arq:abort", {late: 1})
    with pytest.raises(JobCancelled):
        await consumer.result(late, timeout=10)


async def test_an_outage_of_the_queue_while_room_is_asked_for_costs_no_attempt(
    producer: Producer, consumer: Consumer, valkey: Valkey, redis: Redis, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    async with tcp_proxy(valkey.port) as proxy:
        env = settings_env(proxy.url, upstream.url, tmp_path, streams_url=valkey.url, lease_s=8)
        upstream.then(script.refusal("server_error", "not now", 503))
        async with running_worker(env):
            (job_id,) = await submit(producer, 1, "narrow/m")
            await wait_until(lambda: upstream.requests, "it has called, and will ask for room again")
            proxy.refuses = True
            proxy.cut()
            before = proxy.accepted
            await wait_until(lambda: proxy.accepted > before + 8, "it has asked in vain")
            proxy.refuses = False
            await whole_answers(consumer, [job_id])
            await wait_until(lambda: redis.exists("deltafan:usage"), "the bill is written")
    assert await ledger(redis) == [(1, "completed")]
