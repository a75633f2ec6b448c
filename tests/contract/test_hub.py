"""Readers in trouble: each learns of its own, nobody of another's, and nobody waits for what will not come."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from typing import Any

import orjson
import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from deltafan import Consumer, InvalidPosition, InvalidRequest, JobCancelled, Producer, RedisUnavailable
from deltafan._errors import ProtocolError
from deltafan._hub import SWEEP_PORTION, Hub
from support.valkey import Valkey, valkey_server
from support.waiting import wait_until

pytestmark = pytest.mark.client
HI = [{"role": "user", "content": "Hi"}]
EVENTS, STATE = "deltafan:{j}:events", "deltafan:{j}:state"


async def write(redis: Redis, position: str, kind: str, data: bytes | Mapping[str, Any]) -> None:
    payload = data if isinstance(data, bytes) else orjson.dumps(data)
    await redis.xadd(EVENTS, {"type": kind, "data": payload}, id=position)
    await redis.expire(EVENTS, 600)
    await redis.publish("deltafan:{j}:bell", "")


@pytest.fixture
async def job(producer: Producer, redis: Redis) -> None:
    await producer.submit(model="m", messages=HI, job_id="j")
    await write(redis, "5-0", "started", {"mode": "fresh"})


@pytest.mark.usefixtures("job")
async def test_a_hole_longer_than_a_page_is_passed_as_well(consumer: Consumer, redis: Redis) -> None:
    pipe = redis.pipeline(transaction=False)
    for seq in (1, *range(3, 2600)):
        pipe.xadd(EVENTS, {"type": "content", "data": b"x"}, id=f"5-{seq}")
    await pipe.execute()
    await write(redis, "6-0", "started", {"mode": "replay"})
    await write(redis, "6-1", "content", b"whole")
    assert (await consumer.snapshot("j")).content == "whole"
    async with consumer.tail("j") as events:
        seen = [await asyncio.wait_for(anext(events), 5) for _ in range(4)]
        await write(redis, "6-2", "completed", {"finish_reason": "stop"})
        seen += [event async for event in events]
    assert [str(event.position) for event in seen] == ["5-0", "5-1", "6-0", "6-1", "6-2"]


@pytest.mark.parametrize("after", ["99999999999999999999999-0", f"{1 << 64}-0", "1" * 5000 + "-0"])
def test_a_position_that_redis_could_not_hold_is_refused_at_the_door(after: str, consumer: Consumer) -> None:
    with pytest.raises(InvalidPosition):
        consumer.tail("j", after=after)


@pytest.mark.usefixtures("job")
async def test_when_a_consumer_ends_nobody_goes_on_waiting_for_it(valkey: Valkey) -> None:
    async with Consumer.connect(valkey.url) as consumer:
        tail = consumer.tail("j")
        events = await tail.__aenter__()
        await anext(events)
        reading = asyncio.ensure_future(anext(events))
        waiting = asyncio.create_task(consumer.result("j"))
        await wait_until(lambda: events.follower.cursor is not None, "both wait")
    for ended in (reading, waiting):
        with pytest.raises(RuntimeError, match="closed"):
            await asyncio.wait_for(ended, 5)
    with pytest.raises(RuntimeError, match="closed"):
        await consumer.snapshot("j")
    with pytest.raises(RuntimeError, match="closed"):
        await consumer.result("j", timeout=1)


async def test_when_the_hub_fails_its_readers_hear_of_it(fresh_valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(_self: Hub) -> None:
        raise ArithmeticError("a defect")

    async with Redis.from_url(fresh_valkey.url) as redis, Producer.connect(fresh_valkey.url) as producer:
        await producer.submit(model="m", messages=HI, job_id="j")
        await write(redis, "5-0", "started", {"mode": "fresh"})
    with pytest.raises(ArithmeticError):
        async with Consumer.connect(fresh_valkey.url) as consumer, consumer.tail("j") as events:
            await anext(events)
            monkeypatch.setattr(Hub, "_reopen", fail)
            async with Redis.from_url(fresh_valkey.url) as redis:
                await redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
                await redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            await asyncio.wait_for(anext(events), 5)


async def test_a_user_without_channels_is_told_so(fresh_valkey: Valkey) -> None:
    async with Redis.from_url(fresh_valkey.url) as redis, Producer.connect(fresh_valkey.url) as producer:
        await redis.execute_command("ACL", "SETUSER", "me", "on", ">pw", "~*", "+@all", "resetchannels")
        await producer.submit(model="m", messages=HI, job_id="j")
    url = fresh_valkey.url.replace("redis://", "redis://me:pw@")
    async with Consumer.connect(url) as consumer:
        with pytest.raises(RedisUnavailable, match="SUBSCRIBE"):
            await consumer.result("j", timeout=5)


@pytest.mark.usefixtures("job")
async def test_an_entry_that_nobody_could_have_written_concerns_its_own_readers_only(
    consumer: Consumer, producer: Producer, redis: Redis
) -> None:
    await producer.submit(model="m", messages=HI, job_id="other")
    async with consumer.tail("j") as events:
        await anext(events)
        await write(redis, "5-2", "content", b"behind a hole")
        await redis.xadd(EVENTS, {"type": "started", "data": b"oops"}, id="6-0")
        await redis.publish("deltafan:{j}:bell", "")
        with pytest.raises(ProtocolError, match="job j"):
            await asyncio.wait_for(anext(events), 5)
    assert (await consumer.snapshot("other")).status == "queued", "the connection stands"


@pytest.mark.usefixtures("job")
async def test_an_expiry_behind_the_end_is_nothing_to_who_has_the_end(consumer: Consumer, redis: Redis) -> None:
    await write(redis, "5-1", "completed", {"finish_reason": "stop"})
    await redis.hset(STATE, "status", "completed")  # type: ignore[misc]
    async with consumer.tail("j") as events:
        await anext(events)
        await anext(events)
        await redis.delete(EVENTS)
        for feed in consumer._feeds._feeds.values():
            feed.on_sweep()
        await consumer._hub.ask(b"*1\r\n$4\r\nPING\r\n")
        assert [event async for event in events] == []


async def test_a_server_that_changes_its_role_is_waited_for(fresh_valkey: Valkey) -> None:
    async with Redis.from_url(fresh_valkey.url) as redis, Producer.connect(fresh_valkey.url) as producer:
        await producer.submit(model="m", messages=HI, job_id="j")
        async with Consumer.connect(fresh_valkey.url) as consumer, consumer.tail("j") as events:
            reading = asyncio.ensure_future(anext(events))
            await redis.config_set("replica-serve-stale-data", "no")
            await redis.replicaof("127.0.0.1", "1")
            asking = asyncio.create_task(consumer.snapshot("j"))
            await wait_until(lambda: _says_masterdown(redis), "it refuses to read")
            await redis.replicaof("NO", "ONE")
            assert (await asyncio.wait_for(asking, 5)).status == "queued"
            await write(redis, "5-0", "started", {"mode": "fresh"})
            assert (await asyncio.wait_for(reading, 10)).type == "started"


@asynccontextmanager
async def slow_script(server: Valkey) -> AsyncIterator[None]:
    """Somebody's script that does not end; until the block's end the server answers BUSY."""
    async with Redis.from_url(server.url) as theirs, Redis.from_url(server.url) as redis:
        running = asyncio.ensure_future(theirs.eval("while true do end", 0))

        async def is_busy() -> bool:
            try:
                await redis.ping()
            except ResponseError as error:
                return "is busy" in str(error)
            return False

        await wait_until(is_busy, "it is busy")
        yield
        await redis.script_kill()
        with pytest.raises(ResponseError):
            await running


async def test_many_jobs_are_looked_at_a_few_at_a_time(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all readers of the process wait, each few seconds, until each job has been looked at."""
    monkeypatch.setattr("deltafan._hub.SWEEP_S", 0.1)
    portions: list[tuple[bytes, ...]] = []
    async with (
        Producer.connect(valkey.url) as producer,
        Consumer.connect(valkey.url) as consumer,
        AsyncExitStack() as stack,
    ):
        monkeypatch.setattr(consumer._hub, "_sweep", portions.append)
        for job in await producer.submit_many([{"model": "m", "messages": HI}] * 40):
            await stack.enter_async_context(consumer.tail(job.id))
        names = set(consumer._hub._channels)
        for _ in range(2):
            portions.clear()
            await wait_until(lambda: {name for portion in portions for name in portion} == names, "each has its turn")
    assert max(map(len, portions)) == SWEEP_PORTION


async def test_somebodys_slow_script_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltafan._hub.SWEEP_S", 0.2)
    with valkey_server(**{"busy-reply-threshold": 50}) as server:
        async with Redis.from_url(server.url) as redis, Producer.connect(server.url) as producer:
            await producer.submit_many([{"model": "m", "messages": HI, "job_id": job_id} for job_id in "jk"])
            await write(redis, "5-0", "started", {"mode": "fresh"})
            async with Consumer.connect(server.url) as consumer, consumer.tail("j") as events:
                await anext(events)
                async with slow_script(server):
                    bells = consumer._hub._bells
                    received_bytes = bells.received_bytes
                    reading = asyncio.ensure_future(anext(events))
                    submitting = asyncio.create_task(producer.submit(model="m", messages=HI))
                    asking = asyncio.create_task(consumer.snapshot("j"))
                    joining = asyncio.create_task(consumer.result("k"))
                    await wait_until(lambda: bells.received_bytes > received_bytes, "its subscription is refused")
                assert (await asyncio.wait_for(submitting, 5)).created
                assert (await asyncio.wait_for(asking, 5)).status == "running"
                assert [await producer.cancel(job_id) for job_id in "jk"] == ["cancelled"] * 2
                assert (await asyncio.wait_for(reading, 5)).type == "cancelled"
                with pytest.raises(JobCancelled):
                    await asyncio.wait_for(joining, 5)


async def _says_masterdown(redis: Redis) -> bool:
    return "errorstat_MASTERDOWN" in await redis.info("errorstats")


@pytest.mark.parametrize("url", ["redis://:s3cret/part@localhost", "redis://me:s3cret@part#x@localhost"])
async def test_a_url_that_can_not_be_read_is_not_quoted(url: str) -> None:
    with pytest.raises(RedisUnavailable) as caught:
        async with Consumer.connect(url):
            pass
    shown = f"{caught.value} {caught.value.__cause__}"
    assert "s3cret" not in shown
    assert "part" not in shown
    assert "percent-encode" in shown


@pytest.mark.parametrize("deadline", [60, 60.0, "2027-01-01T00:00:00"])
async def test_a_deadline_that_could_mean_two_things_is_refused(producer: Producer, deadline: Any) -> None:
    with pytest.raises(InvalidRequest, match="deadline"):
        await producer.submit_many([{"model": "m", "messages": HI, "deadline": deadline}])


async def test_an_id_that_is_no_text_is_refused(producer: Producer) -> None:
    with pytest.raises(InvalidRequest, match="job_id"):
        await producer.submit_many([{"model": "m", "messages": HI, "job_id": 4711}])


async def test_what_was_under_way_when_a_later_request_was_refused_is_submitted(
    producer: Producer, redis: Redis
) -> None:
    requests: list[dict[str, Any]] = [{"model": "m", "messages": HI, "job_id": f"j{n}"} for n in range(300)]
    requests[260]["messages"] = []
    with pytest.raises(InvalidRequest):
        await producer.submit_many(requests)
    assert await redis.zcard("deltafan:queue:interactive") == 250


async def test_the_request_of_a_job_lives_as_long_as_its_own_result(producer: Producer, redis: Redis) -> None:
    body = {"tools": [{"type": "function", "function": {"name": "f"}}]}
    await producer.submit(model="m", messages=HI, job_id="j", body=body, ttl=timedelta(days=7))
    assert await redis.ttl("deltafan:{j}:request") > 7 * 86_400
