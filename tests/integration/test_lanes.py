"""Lanes and tenants on real workers: interactive jobs find a slot, batch jobs find time, tenants take turns."""

import asyncio
from collections import Counter
from typing import Any

import pytest
import redis as sync_redis
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from deltafan import Consumer, Producer
from deltafan._lua import load
from deltafan.testing import ScriptedUpstream
from deltafan.testing import chat as script
from deltafan_worker import _leased
from deltafan_worker._queue_pool import run_script
from support.valkey import Valkey
from support.waiting import wait_until
from support.workers import running_worker

QUEUE = "deltafan:queue:batch"


def prompts(count: int, name: str, **fields: Any) -> list[dict[str, Any]]:
    return [{"model": "sim", "messages": [{"role": "user", "content": name}], **fields} for _ in range(count)]


def asked(upstream: ScriptedUpstream) -> list[str]:
    return [request.body["messages"][0]["content"] for request in upstream.requests]


async def test_batch_jobs_leave_a_slot_to_interactive_ones(
    producer: Producer, consumer: Consumer, env: dict[str, str], upstream: ScriptedUpstream
) -> None:
    gate = asyncio.Event()
    upstream.standing = [gate, *script.text("x")]
    await producer.submit_many(prompts(20, "batch", lane="batch"))
    async with running_worker(env | {"DELTAFAN_CONCURRENCY": "4"}) as worker:
        await wait_until(lambda: len(upstream.requests) == 3, "three of four slots are taken")
        assert len(worker.tasks) == 3
        upstream.then(script.text("at once"))
        job = await producer.submit(**prompts(1, "now")[0])
        assert (await consumer.result(job.id, timeout=5)).content == "at once"
        assert asked(upstream) == ["batch"] * 3 + ["now"]
        gate.set()
        await wait_until(lambda: len(upstream.requests) == 21, "and the others follow")


async def test_a_slot_that_is_freed_under_a_claim_for_the_other_lane_is_filled_at_once(
    producer: Producer,
    env: dict[str, str],
    upstream: ScriptedUpstream,
    redis: Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_leased, "POLL_S", 60.0)
    first, others = asyncio.Event(), asyncio.Event()
    upstream.then([first, *script.text("x")])
    upstream.standing = [others, *script.text("x")]
    await producer.submit_many(prompts(5, "batch", lane="batch"))
    async with running_worker(env | {"DELTAFAN_CONCURRENCY": "3"}) as worker:

        async def slow(pool: Any, called: Any, *args: Any, **options: Any) -> Any:
            reply = await run_script(pool, called, *args, **options)
            if called.name == "claim" and len(worker.claims) == 2 and not first.is_set():
                await redis.delete(f"{QUEUE}:bell")
                await wait_until(lambda: len(upstream.requests) == 2, "both have been begun")
                first.set()
                await wait_until(lambda: len(worker.claims) == 1, "one has ended")
            return reply

        monkeypatch.setattr(_leased, "run_script", slow)
        async with asyncio.timeout(6):
            await wait_until(lambda: len(upstream.requests) == 3, "another has taken its slot")
        others.set()


async def test_interactive_jobs_without_end_do_not_starve_batch_jobs(
    producer: Producer, env: dict[str, str], upstream: ScriptedUpstream
) -> None:
    upstream.standing = script.paced(1, 0.05)
    await producer.submit_many(prompts(60, "now"))
    await producer.submit_many(prompts(1, "batch", lane="batch"))
    async with running_worker(env | {"DELTAFAN_CONCURRENCY": "2", "DELTAFAN_BATCH_PATIENCE_S": "0.2"}):
        await wait_until(lambda: "batch" in asked(upstream), "it is its turn")
        assert 4 < len(upstream.requests) < 50


async def test_a_worker_may_serve_one_lane_alone(
    producer: Producer, consumer: Consumer, env: dict[str, str], upstream: ScriptedUpstream
) -> None:
    (batch,) = await producer.submit_many(prompts(1, "batch", lane="batch"))
    (now,) = await producer.submit_many(prompts(1, "now"))
    async with running_worker(env | {"DELTAFAN_LANES": "batch"}):
        await consumer.result(batch.id, timeout=5)
        assert asked(upstream) == ["batch"]
    async with running_worker(env | {"DELTAFAN_LANES": "interactive"}):
        await consumer.result(now.id, timeout=5)


async def test_ten_rows_of_one_tenant_do_not_wait_for_a_thousand_of_another(
    producer: Producer, env: dict[str, str], upstream: ScriptedUpstream
) -> None:
    await producer.submit_many(prompts(1000, "many", lane="batch", tenant="a"))
    await producer.submit_many(prompts(10, "few", lane="batch", tenant="b"))
    async with running_worker(env | {"DELTAFAN_CONCURRENCY": "1"}):
        await wait_until(lambda: asked(upstream).count("few") == 10, "the ten have had their turns")
        assert len(upstream.requests) <= 25


async def test_tenants_take_turns_in_line_for_a_limit_as_well(
    producer: Producer, env: dict[str, str], upstream: ScriptedUpstream, redis: Redis
) -> None:
    many = [fields | {"model": "one"} for fields in prompts(300, "many", lane="batch", tenant="a")]
    few = [fields | {"model": "one"} for fields in prompts(5, "few", lane="batch", tenant="b")]
    await producer.submit_many(many)
    async with running_worker(env | {"DELTAFAN_CONCURRENCY": "4"}):
        await wait_until(lambda: len(upstream.requests) > 3, "some have run, and the others stand in line")
        before = len(upstream.requests)
        await producer.submit_many(few)
        await wait_until(lambda: asked(upstream).count("few") == 5, "the five have had their turns")
        assert len(upstream.requests) < 300 - 50, f"{before} had run before"


async def test_a_job_that_was_begun_goes_before_those_that_were_not(
    producer: Producer, env: dict[str, str], upstream: ScriptedUpstream, redis: Redis
) -> None:
    (begun,) = await producer.submit_many(prompts(1, "begun", lane="batch"))
    await producer.submit_many(prompts(30, "waiting", lane="batch"))
    seconds, _ = await redis.time()
    await redis.zadd(QUEUE, {begun.id: seconds * 1000 - 1})  # as its lease's end leaves it
    async with running_worker(env | {"DELTAFAN_CONCURRENCY": "1"}):
        await wait_until(lambda: len(upstream.requests) > 0, "the first is called")
        assert asked(upstream)[0] == "begun"


OPS = st.lists(st.one_of(st.sampled_from("abc"), st.integers(1, 4)), max_size=120)


@settings(max_examples=80, deadline=None)
@given(ops=OPS)
def test_tenants_that_wait_are_served_alike(valkey: Valkey, ops: list[str | int]) -> None:
    """While two tenants both have something waiting, neither is served more than two jobs more than the other."""
    enqueue = load("enqueue_only", using=("enqueue",))
    with sync_redis.Redis.from_url(valkey.url) as client:
        client.flushall()
        waiting: Counter[str] = Counter()
        lead: Counter[tuple[str, str]] = Counter()
        for number, op in enumerate(ops):
            if isinstance(op, str):
                keys = (
                    f"arq:job:{number}",
                    f"arq:in-progress:{number}",
                    f"arq:result:{number}",
                    QUEUE,
                    QUEUE + ":bell",
                )
                client.eval(enqueue.source, 5, *keys, f"{op}{number}", "{}", 60000, 0, 1, op, "")
                waiting[op] += 1
                continue
            for member, _ in client.zpopmin(QUEUE, op):
                served = member.decode()[0]
                for other in waiting:
                    both = other != served and waiting[other] > 0
                    lead[served, other] = lead[served, other] + 1 if both else 0
                    lead[other, served] = lead[other, served] - 1 if both else 0
                    assert lead[served, other] <= 2, f"{served} goes before {other}"
                waiting[served] -= 1
                for other in waiting:
                    if waiting[served] == 0:
                        lead[served, other] = lead[other, served] = 0
