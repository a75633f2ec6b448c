"""Submits and cancels whose outcome is not known, or known only to somebody else."""

import copy
import pickle
from collections.abc import Sequence
from functools import partial
from itertools import count
from random import Random
from typing import Any

import orjson
import pytest
from redis.asyncio import Redis

from deltafan import (
    Consumer,
    DeltafanError,
    Generation,
    InvalidPosition,
    InvalidRequest,
    JobCancelled,
    JobConflict,
    JobFailed,
    JobNotFound,
    Producer,
    ProtocolError,
    QueueFull,
    RedisUnavailable,
    ResultTimeout,
    StreamExpired,
)
from deltafan._client import ScriptCall
from deltafan._lua import Script
from support.valkey import Valkey

pytestmark = pytest.mark.client
HI = [{"role": "user", "content": "Hi"}]
QUEUE = "deltafan:queue:interactive"


async def test_a_repeat_with_the_ids_of_an_error_is_the_same_jobs(redis: Redis, redis_url: str) -> None:
    async with (
        Producer.connect(redis_url, replicas=1, replicas_timeout_ms=20) as replicated,
        Producer.connect(redis_url) as producer,
    ):
        with pytest.raises(RedisUnavailable, match=r"0 of 1 replicas .* submit it again with job_id='") as caught:
            await replicated.submit(model="m", messages=HI)
        (job_id,) = caught.value.job_ids
        assert f"{job_id!r}" in str(caught.value)
        assert not (await producer.submit(model="m", messages=HI, job_id=job_id)).created
        with pytest.raises(RedisUnavailable, match="submit it again with the ids") as caught:
            await replicated.submit_many([{"model": "m", "messages": HI}] * 3)
        again = [{"model": "m", "messages": HI, "job_id": job_id} for job_id in caught.value.job_ids]
        assert [job.created for job in await producer.submit_many(again)] == [False] * 3
    assert await redis.zcard(QUEUE) == 4


async def test_a_cancel_without_its_replica_says_so(redis_url: str, producer: Producer) -> None:
    await producer.submit(model="m", messages=HI, job_id="j")
    async with Producer.connect(redis_url, replicas=1, replicas_timeout_ms=20) as replicated:
        with pytest.raises(RedisUnavailable, match="0 of 1 replicas"):
            await replicated.cancel("j")
    assert await producer.cancel("j") == "ended"


async def test_a_server_that_waits_for_its_replicas_is_not_taken_for_silent(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltafan._client._SILENCE_S", 0.1)
    async with Producer.connect(redis_url, replicas=1, replicas_timeout_ms=500) as replicated:
        connection = replicated._queue._connection
        with pytest.raises(RedisUnavailable, match="0 of 1 replicas"):
            await replicated.submit(model="m", messages=HI)
        assert replicated._queue._connection is connection


async def test_one_conflict_among_many_tells_what_else_was_sent(redis: Redis, producer: Producer) -> None:
    await producer.submit(model="other", messages=HI, job_id="x5")
    ids = [f"x{n}" for n in range(1000)]
    with pytest.raises(JobConflict, match="job x5") as caught:
        await producer.submit_many({"model": "m", "messages": HI, "job_id": job_id} for job_id in ids)
    sent = caught.value.job_ids
    assert sent == tuple(ids[: len(sent)])
    assert await redis.zcard(QUEUE) == len(sent), "and all but the one were accepted"


async def test_a_wrong_request_behind_others_tells_what_was_sent(redis: Redis, producer: Producer) -> None:
    with pytest.raises(InvalidRequest, match=r"^requests\[260\]\.messages: a non-empty list") as caught:
        await producer.submit_many({"model": "m", "messages": HI if n != 260 else []} for n in range(300))
    assert {job_id.encode() for job_id in caught.value.job_ids} == set(await redis.zrange(QUEUE, 0, -1))
    with pytest.raises(InvalidRequest, match=r"^messages: a non-empty list") as caught:
        await producer.submit(model="m", messages=[])
    assert caught.value.job_ids == ()


async def test_an_id_that_is_given_twice_at_once_is_one_job(redis: Redis, producer: Producer) -> None:
    request = {"model": "m", "messages": HI}
    jobs = await producer.submit_many(request | {"job_id": job_id} for job_id in ("a", "b", "a"))
    assert [(job.id, job.created) for job in jobs] == [("a", True), ("b", True), ("a", False)]
    with pytest.raises(JobConflict, match="job c"):
        await producer.submit_many([request | {"job_id": "c"}, request | {"job_id": "c", "model": "n"}])
    assert await redis.zrange(QUEUE, 0, -1) == [b"a", b"b", b"c"]
    assert orjson.loads(await redis.get("arq:job:c"))["k"]["model"] == "m"


async def test_jobs_of_both_lanes_and_many_tenants_go_where_they_belong(redis: Redis, producer: Producer) -> None:
    lanes = {"interactive": [0, 1, 2, 7], "batch": [3, 4, 5, 6]}
    lane_of = {number: lane for lane, numbers in lanes.items() for number in numbers}
    jobs = await producer.submit_many(
        {"model": "m", "messages": HI, "job_id": f"j{n}", "lane": lane_of[n], "tenant": "x" if n < 6 else "y"}
        for n in range(8)
    )
    assert [job.id for job in jobs] == [f"j{n}" for n in range(8)]
    assert await redis.zrange(QUEUE, 0, -1) == [b"j0", b"j1", b"j2", b"j7"]
    places = await redis.zrange("deltafan:queue:batch", 0, -1, withscores=True)
    assert places == [(b"j3", 2), (b"j6", 2), (b"j4", 3), (b"j5", 4)], "the tenants take turns"
    for lane in lanes:
        assert await redis.execute_command("LLEN", f"deltafan:queue:{lane}:bell") == 4


async def test_places_are_the_same_however_many_are_submitted_at_once(redis: Redis, producer: Producer) -> None:
    chance = Random(5)
    rounds = [(chance.choices("abc", k=chance.randint(1, 40)), chance.randint(0, 40)) for _ in range(12)]

    async def places(*, together: bool) -> list[Any]:
        await redis.flushall()
        seen: list[Any] = []
        ids = map("j{}".format, count())
        for tenants, claimed in rounds:
            fields = {"model": "m", "messages": HI, "lane": "batch"}
            requests = [fields | {"tenant": tenant, "job_id": next(ids)} for tenant in tenants]
            for portion in [requests] if together else [[request] for request in requests]:
                await producer.submit_many(portion)
            seen.append(await redis.zrange("deltafan:queue:batch", 0, -1, withscores=True))
            await redis.zpopmin("deltafan:queue:batch", claimed)
        return seen

    alone = await places(together=False)
    assert await places(together=True) == alone
    first = {waiting[0][1] for waiting in alone[1:]}
    assert {2} < first, "now and then, and not always, none had waited"


async def test_a_lane_that_gets_full_refuses_the_rest(redis: Redis, redis_url: str) -> None:
    ids = [f"j{n}" for n in range(20)]
    requests = [{"model": "m", "messages": HI, "job_id": job_id} for job_id in ids]
    async with Producer.connect(redis_url, max_queued=15) as producer:
        with pytest.raises(QueueFull, match="j15"):
            await producer.submit_many(requests)
        assert [job.created for job in await producer.submit_many(requests[:15])] == [False] * 15
    assert {job_id.decode() for job_id in await redis.zrange(QUEUE, 0, -1)} == set(ids[:15])
    assert len(await redis.keys("*:state")) == 15, "of what was refused nothing is left"


async def test_large_requests_are_not_gathered_into_one_call(
    producer: Producer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server holds a call's arguments as a whole, and nobody else is served while it runs."""
    run_many, sizes = producer._queue.run_many, list[list[int]]()

    async def looked_at(script: Script, calls: Sequence[ScriptCall], *more: bytes) -> list[Any]:
        sizes.extend([len(arg) for arg in args if isinstance(arg, bytes)] for _, args in calls)
        return await run_many(script, calls, *more)

    monkeypatch.setattr(producer._queue, "run_many", looked_at)
    texts = ["x" * 50_000, "x" * 50_000, "x" * 10_000, "x" * 1_000_000, *["x"] * 60]
    jobs = await producer.submit_many({"model": "m", "messages": [{"role": "user", "content": t}]} for t in texts)
    assert len({job.id for job in jobs}) == len(texts)
    assert [len(call) for call in sizes] == [1, 2, 1, 25, 25, 10]
    assert all(sum(call) <= 64 * 1024 for call in sizes if len(call) > 1)


@pytest.mark.parametrize("fate", ["queued", "has run"])
async def test_a_job_whose_first_answer_was_lost_is_not_forgotten_when_the_lane_is_full(
    redis: Redis, valkey: Valkey, fresh_valkey: Valkey, fate: str
) -> None:
    """The queue's server takes the job, its answer is lost, the job runs, others fill the lane; it is asked again."""
    connect = partial(Producer.connect, valkey.url, streams_url=fresh_valkey.url)
    state = "deltafan:{j}:state"
    async with (
        Redis.from_url(fresh_valkey.url) as streams,
        connect() as others,
        connect(max_queued=2) as producer,
    ):
        run_many = producer._queue.run_many

        async def asked_twice(script: Script, calls: Sequence[ScriptCall], *more: bytes) -> list[Any]:
            await run_many(script, calls, *more)
            if fate == "has run":
                await streams.hset(state, mapping={"status": "completed", "attempt": 7})
            await redis.delete("arq:job:j")
            await redis.zrem(QUEUE, "j")
            await others.submit_many([{"model": "m", "messages": HI}] * 2)
            return await run_many(script, calls, *more)

        producer._queue.run_many = asked_twice  # type: ignore[method-assign]
        if fate == "queued":
            with pytest.raises(QueueFull):
                await producer.submit(model="m", messages=HI, job_id="j")
            assert not await streams.exists(state)
        else:
            assert (await producer.submit(model="m", messages=HI, job_id="j")).created
            assert await streams.hget(state, "status") == b"completed"


async def test_a_job_that_a_stock_client_enqueued_can_be_cancelled_before_it_begins(
    redis: Redis, producer: Producer, consumer: Consumer
) -> None:
    await redis.set("arq:job:j", b"{}", ex=600)
    assert await producer.cancel("j", reason="enough") == "cancelled"
    with pytest.raises(JobCancelled, match="enough"):
        await consumer.result("j", timeout=5)
    assert await producer.cancel("j") == "ended"
    with pytest.raises(JobNotFound):
        await producer.cancel("other")


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("field", "why"),
        InvalidPosition("5--1"),
        JobConflict("j"),
        QueueFull("j", "batch", 3, 2),
        JobNotFound("j"),
        StreamExpired("j", result_available=True),
        JobFailed("j", "failed: x", Generation(status="failed", content="half")),
        JobCancelled("j", "cancelled", Generation(status="cancelled")),
        ResultTimeout("j", 5, "queued"),
        RedisUnavailable("redis://localhost", "why"),
        ProtocolError("why"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_crosses_processes(error: DeltafanError) -> None:
    error.job_ids = ("j",)
    for same in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert (type(same), str(same), vars(same)) == (type(error), str(error), vars(error))
