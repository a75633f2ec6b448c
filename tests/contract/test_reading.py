"""What readers must be told, however unluckily they ask: of a job's end, of a wrong position, of what is gone."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson
import pytest
from redis.asyncio import Redis

from deltafan import (
    Consumer,
    Event,
    InvalidPosition,
    JobCancelled,
    JobFailed,
    Position,
    Producer,
    ProtocolError,
    RedisUnavailable,
    ResultTimeout,
    StreamExpired,
)
from deltafan._hub import Hub
from deltafan._resp import RespConnection
from support.valkey import Valkey
from support.waiting import wait_until

pytestmark = pytest.mark.client
HI = [{"role": "user", "content": "Hi"}]
EVENTS, STATE, RESULT = (f"deltafan:{{j}}:{name}" for name in ("events", "state", "result"))


async def write(redis: Redis, position: str, kind: str, data: bytes | Mapping[str, Any], *, ring: bool = True) -> None:
    payload = data if isinstance(data, bytes) else orjson.dumps(data)
    await redis.xadd(EVENTS, {"type": kind, "data": payload}, id=position)
    await redis.expire(EVENTS, 600)
    if ring:
        await redis.publish("deltafan:{j}:bell", "")


@pytest.fixture
async def job(producer: Producer, redis: Redis) -> None:
    await producer.submit(model="m", messages=HI, job_id="j")


@pytest.fixture
async def ended(job: None, redis: Redis) -> None:
    await write(redis, "5-0", "started", {"mode": "fresh"})
    await write(redis, "5-1", "content", b"a")
    await write(redis, "5-2", "completed", {"finish_reason": "stop"})


async def read(consumer: Consumer, after: Position | str | None = None) -> list[Event]:
    async with asyncio.timeout(10), consumer.tail("j", after=after) as events:
        return [event async for event in events]


class Halting:
    """A transport that sends `count` commands and keeps the rest of them back, once."""

    def __init__(self, connection: RespConnection, count: int) -> None:
        self._connection, self._transport, self._count = connection, connection._transport, count
        connection._transport = self  # type: ignore[assignment]
        self._rest = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        commands = [b"*" + command for command in data.split(b"*")[1:]]  # none of them has a * inside
        self._transport.write(b"".join(commands[: self._count]))
        self._rest, self._left = b"".join(commands[self._count :]), len(commands) - self._count

    async def halted(self) -> None:
        await wait_until(lambda: self._rest and len(self._connection._handlers) == self._left, "the first are answered")

    def go_on(self) -> None:
        self._connection._transport = self._transport
        self._transport.write(self._rest)


@pytest.mark.usefixtures("job")
@pytest.mark.parametrize("count", [1, 2])
async def test_a_result_of_a_job_that_ends_between_two_questions(
    consumer: Consumer, producer: Producer, count: int
) -> None:
    halting = Halting(consumer._hub._reads, count)
    asking = asyncio.create_task(consumer.result("j", timeout=5))
    await halting.halted()
    await producer.cancel("j")
    halting.go_on()
    with pytest.raises(JobCancelled):
        await asking


@pytest.mark.parametrize("count", [1, 2, 3])
async def test_a_tail_of_a_job_that_ends_between_two_questions(consumer: Consumer, redis: Redis, count: int) -> None:
    """One that a stock producer enqueued, so that nothing but arq's record tells of it; and its bell is lost."""
    await redis.set("arq:job:j", b"{}", ex=600)
    reading = asyncio.create_task(read(consumer))
    await wait_until(lambda: consumer._feeds._feeds and not consumer._hub._unanswered, "it waits")
    halting = Halting(consumer._hub._reads, count)
    consumer._hub._sweep(tuple(consumer._hub._channels))
    await halting.halted()
    await write(redis, "5-0", "cancelled", {"reason": "enough"}, ring=False)
    await redis.hset(STATE, "status", "cancelled")  # type: ignore[misc]
    await redis.expire(STATE, 600)
    await redis.set(RESULT, orjson.dumps({"v": 1, "status": "cancelled", "position": "5-0"}), ex=600)
    await redis.delete("arq:job:j")
    halting.go_on()
    assert [event.type for event in await reading] == ["cancelled"]


@pytest.mark.usefixtures("ended")
@pytest.mark.parametrize("after", ["999-3", "5-77"])
async def test_a_position_beyond_the_end_is_no_complete_answer(consumer: Consumer, after: str) -> None:
    with pytest.raises(InvalidPosition, match=rf"'{after}' is not in the stream of job j, which ends at 5-2"):
        await read(consumer, after)
    assert await read(consumer, "5-2") == []


def test_a_position_that_nobody_could_have_seen_is_refused_in_either_form(consumer: Consumer) -> None:
    for after in ("5--1", Position(5, -1)):
        with pytest.raises(InvalidPosition):
            consumer.tail("j", after=after)


async def test_who_has_read_all_of_an_expired_stream_has_missed_nothing(
    consumer: Consumer, redis: Redis, job: None
) -> None:
    await redis.hset(STATE, "status", "completed")  # type: ignore[misc]
    record = {"v": 1, "status": "completed", "content": "kept", "position": "5-2"}
    await redis.set(RESULT, orjson.dumps(record), ex=600)
    snapshot = await consumer.snapshot("j")
    assert snapshot.content == "kept"
    assert await read(consumer, snapshot.position) == []
    for after in (None, "5-1"):
        with pytest.raises(StreamExpired, match="ask for result"):
            await read(consumer, after)
    await redis.set(RESULT, b"[]", ex=600)
    with pytest.raises(StreamExpired, match="ask for result"):
        await read(consumer, snapshot.position)


@pytest.mark.usefixtures("job")
async def test_two_tails_that_differ_behind_one_hole_each_get_their_own_rest(consumer: Consumer, redis: Redis) -> None:
    for position in ("5-0", "5-1", "5-4"):
        kind, data = ("started", b'{"mode":"fresh"}') if position == "5-0" else ("content", position.encode())
        await write(redis, position, kind, data)
    async with consumer.tail("j", after="5-3") as near, consumer.tail("j", after="5-0") as far:
        assert [(await anext(tail)).text for tail in (near, far)] == ["5-4", "5-1"]
        await wait_until(lambda: far.follower.range_start == near.follower.range_start, "both have read that far")
        await write(redis, "5-5", "content", b"5-5")
        await write(redis, "6-0", "started", {"mode": "replay"})
        assert (await asyncio.wait_for(anext(near), 5)).position == Position(5, 5)
        assert [(await asyncio.wait_for(anext(tail), 5)).type for tail in (near, far)] == ["started"] * 2


@pytest.mark.usefixtures("job")
async def test_a_hole_that_a_failover_took_away_is_read_anew(consumer: Consumer, redis: Redis) -> None:
    await write(redis, "5-0", "started", {"mode": "fresh"})
    await write(redis, "5-2", "content", b"behind a hole")
    async with consumer.tail("j") as events:
        await anext(events)
        await wait_until(lambda: events.follower.range_start == "(5-2", "it has looked behind the hole")
        await redis.delete(EVENTS)
        await write(redis, "5-0", "started", {"mode": "fresh"}, ring=False)
        for seq in (1, 2):
            await write(redis, f"5-{seq}", "content", b"mended", ring=False)
        consumer._hub._sweep(tuple(consumer._hub._channels))
        assert (await asyncio.wait_for(anext(events), 2)).position == Position(5, 1)


@pytest.mark.usefixtures("job")
async def test_readers_that_join_a_job_together_share_its_survey(
    consumer: Consumer, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    await write(redis, "5-0", "started", {"mode": "fresh"})
    read, sizes = Hub.read, []

    def counting(hub: Hub, commands: Sequence[bytes], handler: Callable[[Any], None]) -> None:
        sizes.append(len(commands))
        read(hub, commands, handler)

    monkeypatch.setattr(Hub, "read", counting)

    async def join() -> str:
        async with consumer.tail("j") as events:
            return (await anext(events)).type

    assert await asyncio.gather(*[join() for _ in range(100)]) == ["started"] * 100
    assert sizes.count(4) < 10, "a survey asks four questions, a read one"


@pytest.mark.usefixtures("job")
async def test_one_tail_is_for_one_task(consumer: Consumer, redis: Redis) -> None:
    await write(redis, "5-0", "started", {"mode": "fresh"})
    async with consumer.tail("j") as events:
        await anext(events)
        waiting = asyncio.ensure_future(anext(events))
        await wait_until(lambda: events._waiter is not None, "it waits")
        with pytest.raises(RuntimeError, match="a tail for each"):
            await anext(events)
        await write(redis, "5-1", "content", b"a")
        assert (await waiting).text == "a"


@pytest.mark.usefixtures("job")
async def test_a_snapshot_names_an_entry_that_is_nobodys_to_read(consumer: Consumer, redis: Redis) -> None:
    await write(redis, "5-0", "started", {"mode": "fresh"})
    await write(redis, "5-2", "content", b"behind a hole")
    await write(redis, "6-0", "started", b"oops")
    with pytest.raises(ProtocolError, match="job j"):
        await consumer.snapshot("j")


async def test_what_a_job_wrote_before_somebody_ended_it_comes_with_its_failure(
    consumer: Consumer, redis: Redis, job: None
) -> None:
    """As when a worker died in mid-answer: the script that ends the job knows nothing of its text."""
    await write(redis, "5-0", "started", {"mode": "fresh", "model": "m"})
    await write(redis, "5-1", "content", b"Hello wor")
    failure = {"code": "interrupted", "message": "cut", "retryable": False}
    await write(redis, "6-0", "failed", failure)
    await redis.hset(STATE, "status", "failed")  # type: ignore[misc]
    record = {"v": 1, "status": "failed", "content": "", "position": "6-0", "failure": failure}
    await redis.set(RESULT, orjson.dumps(record), ex=600)
    with pytest.raises(JobFailed, match="interrupted") as caught:
        await consumer.result("j")
    assert (caught.value.generation.content, caught.value.generation.model) == ("Hello wor", "m")
    for lost in (redis.xdel(EVENTS, "6-0"), redis.delete(EVENTS)):
        await lost
        with pytest.raises(JobFailed, match="interrupted") as caught:
            await consumer.result("j")
        assert (caught.value.generation.status, caught.value.generation.content) == ("failed", "")


@pytest.mark.usefixtures("job")
async def test_a_timeout_of_zero_looks_once(consumer: Consumer, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltafan._consumer._FIRST_LOOK_S", 60)
    await redis.hset(STATE, "status", "running")  # type: ignore[misc]
    for timeout in (0, 0.05):
        with pytest.raises(ResultTimeout, match="status running"):
            await asyncio.wait_for(consumer.result("j", timeout=timeout), 5)
    await redis.set(RESULT, orjson.dumps({"v": 1, "status": "completed", "content": "whole"}), ex=600)
    assert (await consumer.result("j", timeout=0)).content == "whole"


async def test_a_result_waits_for_its_server_as_long_as_its_own_timeout_says(
    fresh_valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltafan._hub.PATIENCE_S", 0.1)
    async with Producer.connect(fresh_valkey.url) as producer, Consumer.connect(fresh_valkey.url) as consumer:
        await producer.submit(model="m", messages=HI, job_id="j")
        hub, waiting = consumer._hub, asyncio.create_task(consumer.result("j", timeout=20))
        await wait_until(lambda: any(channel.confirmed.done() for channel in hub._channels.values()), "it listens")
        fresh_valkey.kill()
        hub._sweep(tuple(hub._channels))
        with pytest.raises(ResultTimeout, match="status unknown"):
            await consumer.result("j", timeout=0)
        with pytest.raises(RedisUnavailable):
            await consumer.snapshot("j")
        await asyncio.to_thread(fresh_valkey.start)
        await producer.cancel("j")
        with pytest.raises(JobCancelled):
            await waiting
