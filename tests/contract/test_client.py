"""The client library alone, against a server and entries that were written by hand as PROTOCOL.md says."""

import asyncio
import functools
import json
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest
from redis.asyncio import Redis

from deltafan import (
    Consumer,
    Event,
    InvalidRequest,
    JobConflict,
    JobNotFound,
    Position,
    Producer,
    RedisUnavailable,
    StreamExpired,
    check_request,
    fold,
)
from support.valkey import Valkey
from support.waiting import wait_until

pytestmark = pytest.mark.client

HI = [{"role": "user", "content": "Hi"}]
J = "job-1"
EVENTS, STATE, RESULT = (f"deltafan:{{{J}}}:{name}" for name in ("events", "state", "result"))


class Hand:
    """Writes entries of job-1."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def write(self, position: str, kind: str, data: bytes | Mapping[str, Any], *, ring: bool = True) -> None:
        value = data if isinstance(data, bytes) else orjson.dumps(dict(data))
        await self._redis.xadd(EVENTS, {"type": kind, "data": value}, id=position)
        await self._redis.expire(EVENTS, 600)
        if ring:
            await self._redis.publish(f"deltafan:{{{J}}}:bell", "")

    async def start(self, attempt: int, mode: str = "fresh", **fields: Any) -> None:
        await self.write(f"{attempt}-0", "started", {"mode": mode, "attempt_no": attempt, "model": "m", **fields})

    async def text(self, attempt: int, first: int, *pieces: str) -> None:
        for seq, piece in enumerate(pieces, first):
            await self.write(f"{attempt}-{seq}", "content", piece.encode())

    async def complete(self, attempt: int, seq: int) -> None:
        await self.write(f"{attempt}-{seq}", "completed", {"finish_reason": "stop"})


@pytest.fixture
async def hand(redis: Redis, producer: Producer) -> Hand:
    await producer.submit(model="m", messages=HI, job_id=J)
    return Hand(redis)


async def read(consumer: Consumer, after: str | None = None) -> list[Event]:
    async with asyncio.timeout(20), consumer.tail(J, after=after) as events:
        return [event async for event in events]


def positions(events: list[Event]) -> list[str]:
    return [str(event.position) for event in events]


async def test_live_events_arrive_as_they_are_written(consumer: Consumer, hand: Hand) -> None:
    async with consumer.tail(J) as events:
        await hand.start(5)
        assert (await anext(events)).type == "started"
        for seq in range(1, 4):
            await hand.text(5, seq, f"word {seq}")
            event = await asyncio.wait_for(anext(events), 2)
            assert (event.text, event.position) == (f"word {seq}", Position(5, seq))
        await hand.complete(5, 4)
        assert (await anext(events)).finish_reason == "stop"
        with pytest.raises(StopAsyncIteration):
            await anext(events)


async def test_resuming_at_every_position_gives_the_rest(consumer: Consumer, hand: Hand) -> None:
    await hand.start(5)
    await hand.text(5, 1, "a", "b", "c")
    await hand.complete(5, 4)
    whole = await read(consumer)
    assert fold(whole).content == "abc"
    for index, event in enumerate(whole):
        assert await read(consumer, after=str(event.position)) == whole[index + 1 :]


async def test_nothing_yet_and_ended_are_different_answers(consumer: Consumer, hand: Hand) -> None:
    await hand.start(5)
    async with consumer.tail(J) as events:
        await anext(events)
        nothing_yet = asyncio.ensure_future(anext(events))
        assert (await consumer.snapshot(J)).status == "running"
        assert not nothing_yet.done()
        await hand.complete(5, 1)
        assert (await asyncio.wait_for(nothing_yet, 5)).type == "completed"
        await hand.start(6, "restart")  # by a writer that breaks the rules
        with pytest.raises(StopAsyncIteration):
            await asyncio.wait_for(anext(events), 5)
    assert positions(await read(consumer)) == ["5-0", "5-1"], "what lies behind an end is never read"
    assert (await consumer.snapshot(J)).status == "completed"


async def test_what_is_added_while_a_reader_is_cut_off_is_read(consumer: Consumer, hand: Hand, redis: Redis) -> None:
    await hand.start(5)
    async with consumer.tail(J) as events:
        await anext(events)
        pipe = redis.pipeline(transaction=True)
        for kind in ("normal", "pubsub"):
            pipe.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
        pipe.xadd(EVENTS, {"type": "content", "data": b"a"}, id="5-1")
        await pipe.execute()
        assert (await asyncio.wait_for(anext(events), 10)).text == "a"


async def test_a_lost_bell_delays_but_loses_nothing(consumer: Consumer, hand: Hand) -> None:
    async with consumer.tail(J) as events:
        await hand.start(5)
        await anext(events)
        await hand.write("5-1", "content", b"silent", ring=False)
        assert (await asyncio.wait_for(anext(events), 8)).text == "silent"


async def test_a_hole_is_waited_for_and_passed_only_by_a_new_start(consumer: Consumer, hand: Hand) -> None:
    reading = asyncio.create_task(read(consumer))
    await hand.start(5)
    await hand.text(5, 1, "a")
    await hand.text(5, 3, "c")
    await hand.start(6, "replay")
    await hand.text(6, 1, "a", "b", "c")
    await hand.complete(6, 4)
    events = await reading
    assert "5-3" not in positions(events)
    assert fold(events).content == "abc"


async def test_a_new_attempt_voids_the_text_and_continue_keeps_it(consumer: Consumer, hand: Hand) -> None:
    await hand.start(5)
    await hand.text(5, 1, "void")
    await hand.start(6, "restart")
    await hand.text(6, 1, "a", "b", "lost")
    await hand.start(7, "continue", **{"from": "6-2"})
    await hand.text(7, 1, "c")
    await hand.complete(7, 2)
    assert fold(await read(consumer)).content == "abc"


async def test_unknown_types_are_skipped(consumer: Consumer, hand: Hand) -> None:
    await hand.start(5)
    await hand.write("5-1", "weather", b"rain")
    await hand.text(5, 2, "a")
    await hand.complete(5, 3)
    assert [event.type for event in await read(consumer)] == ["started", "content", "completed"]


async def test_a_long_stream_is_read_in_pages_by_many_readers(consumer: Consumer, hand: Hand, redis: Redis) -> None:
    await hand.start(5)
    pipe = redis.pipeline(transaction=False)
    for seq in range(1, 4501):
        pipe.xadd(EVENTS, {"type": "content", "data": b"x"}, id=f"5-{seq}")
    await pipe.execute()
    await hand.complete(5, 4501)
    for events in await asyncio.gather(*[read(consumer) for _ in range(20)]):
        assert [event.position.seq for event in events] == list(range(4502))
    assert (await consumer.snapshot(J)).content == "x" * 4500


async def test_a_reader_that_stops_reading_holds_two_pages_at_most(
    consumer: Consumer, hand: Hand, redis: Redis
) -> None:
    await hand.start(5)
    async with consumer.tail(J) as slow:
        await anext(slow)
        for portion in range(8):
            pipe = redis.pipeline(transaction=False)
            for seq in range(portion * 1000 + 1, portion * 1000 + 1001):
                pipe.xadd(EVENTS, {"type": "content", "data": b"x"}, id=f"5-{seq}")
            pipe.publish(f"deltafan:{{{J}}}:bell", "")
            await pipe.execute()
        await hand.complete(5, 8001)
        await wait_until(lambda: len(slow._events) > 0, "something is held")
        assert len(await read(consumer)) == 8002, "another reader is not slowed"
        assert len(slow._events) <= 2000
        assert len([event async for event in slow]) == 8001, "and it misses nothing"


async def test_snapshot_then_tail_neither_repeats_nor_misses(consumer: Consumer, hand: Hand) -> None:
    assert (await consumer.snapshot(J)).status == "queued"
    await hand.start(5)
    await hand.text(5, 1, "a", "b")
    snapshot = await consumer.snapshot(J)
    assert (snapshot.status, snapshot.content, snapshot.position) == ("running", "ab", Position(5, 2))
    await hand.text(5, 3, "c")
    await hand.complete(5, 4)
    assert positions(await read(consumer, after=str(snapshot.position))) == ["5-3", "5-4"]


async def test_an_expired_stream_is_its_own_error_and_names_the_result(
    consumer: Consumer, hand: Hand, redis: Redis
) -> None:
    await redis.execute_command("HSET", STATE, "status", "completed")
    await redis.set(RESULT, orjson.dumps({"v": 1, "status": "completed", "content": "kept"}), ex=600)
    with pytest.raises(StreamExpired, match="ask for result") as caught:
        await read(consumer)
    assert caught.value.result_available
    assert (await consumer.result(J)).content == "kept"
    await redis.delete(RESULT)
    with pytest.raises(StreamExpired, match="expired as well"):
        await read(consumer)


async def test_a_stream_that_vanishes_under_a_reader_is_noticed(consumer: Consumer, hand: Hand, redis: Redis) -> None:
    async with consumer.tail(J) as events:
        await hand.start(5)
        await anext(events)
        await redis.delete(EVENTS, STATE, f"arq:job:{J}")
        with pytest.raises(StreamExpired):
            await asyncio.wait_for(anext(events), 12)


async def test_unknown_jobs_are_refused_at_once(consumer: Consumer, producer: Producer, redis: Redis) -> None:
    with pytest.raises(JobNotFound, match="nobody"):
        async with consumer.tail("nobody") as events:
            await anext(events)
    for call in (consumer.result("nobody"), consumer.snapshot("nobody"), producer.cancel("nobody")):
        with pytest.raises(JobNotFound):
            await call
    assert await redis.keys("*") == [], "asking leaves nothing behind"


async def test_readers_survive_a_server_that_drops_them(consumer: Consumer, hand: Hand, redis: Redis) -> None:
    async with consumer.tail(J) as events:
        await hand.start(5)
        await anext(events)
        for kind in ("normal", "pubsub"):
            await redis.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
        await hand.text(5, 1, "a")
        assert (await asyncio.wait_for(anext(events), 10)).text == "a"


async def test_the_same_id_is_the_same_job(producer: Producer, redis: Redis) -> None:
    first = await producer.submit(model="m", messages=HI, body={"a": 1, "b": 2}, job_id=J)
    again = await producer.submit(model="m", messages=HI, body={"b": 2, "a": 1}, job_id=J)
    assert (first.created, again.created, again.id) == (True, False, J)
    assert await redis.zcard("deltafan:queue:interactive") == 1
    for other in ({"model": "n"}, {"body": {"a": 2}}):
        fields = {"model": "m", "messages": HI, "body": {"a": 1, "b": 2}, "job_id": J} | other
        with pytest.raises(JobConflict, match="new id"):
            await producer.submit_many([fields])


async def test_a_submit_that_died_half_way_is_mended_by_its_repeat(producer: Producer, redis: Redis) -> None:
    await producer.submit(model="m", messages=HI, job_id=J)
    await redis.delete(f"arq:job:{J}")
    await redis.zrem("deltafan:queue:interactive", J)
    again = await producer.submit(model="m", messages=HI, job_id=J)
    assert not again.created
    assert await redis.exists(f"arq:job:{J}")
    assert await redis.zscore("deltafan:queue:interactive", J)


async def test_an_ended_job_is_not_enqueued_again(producer: Producer, redis: Redis) -> None:
    await producer.submit(model="m", messages=HI, job_id=J)
    assert await producer.cancel(J) == "cancelled"
    await redis.delete(f"arq:job:{J}")
    await redis.zrem("deltafan:queue:interactive", J)
    assert (await producer.submit(model="m", messages=HI, job_id=J)).status == "cancelled"
    assert not await redis.exists(f"arq:job:{J}")


async def test_queue_and_streams_on_two_servers(valkey: Valkey, fresh_valkey: Valkey, redis: Redis) -> None:
    async with Producer.connect(valkey.url, streams_url=fresh_valkey.url) as producer:
        job = await producer.submit(model="m", messages=HI)
        await producer.submit(model="m", messages=HI, job_id=job.id)
    streams: Redis = Redis.from_url(fresh_valkey.url)
    assert await streams.keys("*") == [f"deltafan:{{{job.id}}}:state".encode()]
    await streams.aclose()
    assert set(await redis.keys("*")) == {
        b"deltafan:queue:interactive",
        b"deltafan:queue:interactive:bell",
        f"arq:job:{job.id}".encode(),
    }


async def test_many_jobs_in_few_round_trips_keep_their_order(producer: Producer, redis: Redis) -> None:
    ids = [f"row-{n}" for n in range(1000)]
    await redis.config_resetstat()
    jobs = await producer.submit_many({"model": "m", "messages": HI, "job_id": job_id} for job_id in ids)
    assert [job.id for job in jobs] == ids
    assert await redis.zcard("deltafan:queue:interactive") == 1000
    calls = (await redis.info("commandstats"))["cmdstat_evalsha"]["calls"]
    assert calls <= 80, "40, and those of the first portions again where the server does not have the script yet"
    assert await redis.execute_command("LLEN", "deltafan:queue:interactive:bell") == 64


def nested(depth: int) -> list[Any]:
    return functools.reduce(lambda inner, _: [inner], range(depth - 1), [])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": HI}, "model: is missing"),
        ({"model": "", "messages": HI}, "model: "),
        ({"model": "m"}, "messages: a non-empty list"),
        ({"model": "m", "messages": []}, "messages: a non-empty list"),
        ({"model": "m", "messages": [{"content": "x"}]}, r"messages\[0\]: an object with a role"),
        ({"model": "m", "messages": HI, "temperatur": 1}, "temperatur: is not an option; parameters of the model"),
        ({"model": "m", "messages": HI, "teant": "x"}, "teant: is not an option; did you mean tenant"),
        ({"model": "m", "messages": HI, "job_id": "a b"}, "job_id: 'a b' is not 1 to 64"),
        ({"model": "m", "messages": HI, "job_id": "x" * 65}, "job_id: "),
        ({"model": "m", "messages": HI, "lane": "fast"}, "lane: "),
        ({"model": "m", "messages": HI, "api": "soap"}, "api: "),
        ({"model": "m", "messages": HI, "on_interrupt": "retry"}, "on_interrupt: "),
        ({"model": "m", "messages": HI, "body": {"n": 2}}, "body.n: one job is one generation"),
        ({"model": "m", "messages": HI, "body": {"model": "x"}}, "body.model: differs"),
        ({"model": "m", "messages": HI, "body": {"messages": HI}}, "messages: given twice"),
        ({"model": "m", "messages": HI, "body": {"x": object()}}, "body: can not be written as JSON"),
        ({"model": "m", "messages": HI, "body": {"x": "y" * 9_000_000}}, "body: is 9000"),
        ({"model": "m", "messages": HI, "ttl": -1}, "ttl: "),
        ({"model": "m", "messages": HI, "metadata": {"k": "v" * 600}}, "metadata: at most 16"),
        ({"model": "m", "messages": HI, "metadata": {"k": "\ud800"}}, "metadata: can not be written"),
        ({"model": "m", "messages": HI, "deadline": datetime(2030, 1, 1)}, "deadline: has no time zone"),  # noqa: DTZ001
        ({"model": "m", "messages": HI, "deadline": timedelta.max}, "deadline: is further ahead"),
        ({"model": "m", "messages": HI, "deadline": timedelta(seconds=-5)}, "deadline: has passed"),
        ({"model": "m", "messages": HI, "body": []}, "body: "),
        ({"model": "m", "messages": HI, "body": {"messages": []}}, "messages: given twice"),
        (
            {"api": "dashscope", "model": "m", "messages": HI, "body": {"input": {"messages": []}}},
            "messages: given twice",
        ),
        ({"api": "responses", "model": "m", "messages": HI, "body": {"input": ""}}, "messages: given twice"),
        ({"model": "m", "messages": HI, "body": {"a": [{"b": float("nan")}]}}, "body.a.0.b: is no number"),
        ({"model": "m", "messages": HI, "max_output_bytes": True}, "max_output_bytes: "),
        *[
            ({"model": "m", "messages": HI, "body": {"x": nested(depth)}}, "body: can not be written as JSON")
            for depth in range(252, 256)  # the first two can, but not within a record
        ],
    ],
)
async def test_a_wrong_request_is_refused_at_the_door(
    producer: Producer, redis: Redis, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=rf"^requests\[1\]\.{message}"):
        await producer.submit_many([{"model": "ok", "messages": HI}, fields])
    assert await redis.keys("*") == [], "nothing was sent"


def test_a_check_refuses_what_a_submit_would() -> None:
    with pytest.raises(InvalidRequest, match="body: can not be written as JSON"):
        check_request(model="m", messages=HI, body={"x": nested(252)})


def test_what_is_submitted_shows_no_prompt(producer: Producer) -> None:
    shown = repr(producer._submitter.check({"model": "m", "messages": [{"role": "user", "content": "hunter2"}]}))
    assert "interactive" in shown
    assert "hunter2" not in shown


async def test_the_limit_is_of_the_body_alone(redis_url: str) -> None:
    body = {"messages": HI, "user": "ü"}
    size_bytes = len(orjson.dumps(body))
    async with Producer.connect(redis_url, max_body_bytes=size_bytes) as producer:
        await producer.submit(model="m" * 100, body=body)
    async with Producer.connect(redis_url, max_body_bytes=size_bytes - 1) as producer:
        with pytest.raises(InvalidRequest, match=f"is {size_bytes} bytes long, the limit is {size_bytes - 1};"):
            await producer.submit(model="m", body=body)


async def test_null_is_no_wrong_number(producer: Producer) -> None:
    body = {"stop": None, "logit_bias": {"1": 0.5}}
    assert (await producer.submit_many([{"model": "m", "messages": HI, "body": body}]))[0].created
    assert (await producer.submit_many([{"model": "m", "messages": HI, "body": None}]))[0].created


@pytest.mark.parametrize("reason", [None, 5, "\ud800"])
async def test_a_reason_that_can_not_be_stored_is_refused(producer: Producer, reason: Any) -> None:
    with pytest.raises(InvalidRequest, match="reason: a text"):
        await producer.cancel(J, reason=reason)


async def test_every_option_reaches_the_job_record(producer: Producer, redis: Redis) -> None:
    await producer.submit(
        model="m",
        messages=HI,
        job_id=J,
        lane="batch",
        tenant="acme",
        metadata={"a": "b"},
        deadline=timedelta(minutes=5),
        on_interrupt="fail",
        ttl=60,
    )
    record = orjson.loads(await redis.get(f"arq:job:{J}") or b"")
    fields = record["k"]
    assert {name: fields[name] for name in ("lane", "tenant", "metadata", "on_interrupt", "ttl")} == {
        "lane": "batch",
        "tenant": "acme",
        "metadata": {"a": "b"},
        "on_interrupt": "fail",
        "ttl": 60.0,
    }
    assert datetime.fromisoformat(fields["deadline"]) > datetime.now(UTC)
    assert await redis.zscore("deltafan:queue:batch", J)


async def test_no_server_is_said_within_a_second() -> None:
    for connect in (Producer.connect, Consumer.connect):
        started = asyncio.get_running_loop().time()
        with pytest.raises(RedisUnavailable, match=r"redis://:\*\*\*@127.0.0.1:1/0"):
            async with connect("redis://:secret@127.0.0.1:1/0"):
                pass
        assert asyncio.get_running_loop().time() - started < 1.5


async def test_a_closed_producer_says_so(redis_url: str) -> None:
    async with Producer.connect(redis_url) as producer:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        await producer.submit(model="m", messages=HI)


async def test_submits_go_on_when_the_server_comes_back(fresh_valkey: Valkey) -> None:
    async with Producer.connect(fresh_valkey.url) as producer:
        await producer.submit(model="m", messages=HI, job_id="a")
        fresh_valkey.kill()
        submitting = asyncio.create_task(producer.submit(model="m", messages=HI, job_id="b"))
        await asyncio.to_thread(fresh_valkey.start)
        assert (await submitting).created
        assert not (await producer.submit(model="m", messages=HI, job_id="a")).created


def printed_reader() -> Any:
    """The reader that PROTOCOL.md prints, word for word, as a function of `redis` and `job`."""
    page = (Path(__file__).parents[2] / "PROTOCOL.md").read_text()
    code = page.split("### In Python, with redis-py alone")[1].split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {"asyncio": asyncio, "json": json}
    body = textwrap.indent(code, "    ")
    exec(f"async def read(redis, job):\n{body}    return status, ''.join(deltas)\n", names)
    return names["read"]


@pytest.mark.parametrize("damage", ["", "restart", "hole"])
async def test_the_reader_that_the_protocol_prints_needs_none_of_our_code(
    redis: Redis, hand: Hand, damage: str
) -> None:
    reading = asyncio.create_task(printed_reader()(redis, J))
    await hand.start(5)
    if damage:
        await hand.text(5, 1, "void")
    if damage == "hole":
        await hand.text(5, 3, "behind a hole")
    await hand.start(6, "restart")
    await hand.text(6, 1, "Hello, ", "world")
    await hand.complete(6, 3)
    assert await asyncio.wait_for(reading, 10) == ("completed", "Hello, world")


async def test_the_printed_reader_misses_nothing_that_is_added_between_two_reads(redis: Redis, hand: Hand) -> None:
    class Between:
        """A client behind each of whose reads something is added."""

        rest = iter(["a", "b", "c"])

        def __getattr__(self, name: str) -> Any:
            return getattr(redis, name)

        async def xread(self, *args: Any, **options: Any) -> Any:
            answer = await redis.xread(*args, **options)
            if (text := next(self.rest, None)) is not None:
                await hand.text(5, ord(text) - ord("a") + 1, text)
                if text == "c":
                    await hand.complete(5, 4)
            return answer

    await hand.start(5)
    assert await asyncio.wait_for(printed_reader()(Between(), J), 10) == ("completed", "abc")


async def test_the_printed_reader_does_not_wait_for_what_is_not_there(redis: Redis, hand: Hand) -> None:
    await redis.hset(STATE, "status", "completed")  # type: ignore[misc]
    for job in ("never-submitted", J):
        with pytest.raises(LookupError):
            await asyncio.wait_for(printed_reader()(redis, job), 10)


async def test_the_printed_reader_is_not_misled_by_a_job_that_ends_as_it_asks(redis: Redis, hand: Hand) -> None:
    class Ending:
        """The job ends between the first question that follows an empty answer and the next."""

        asked = 0

        def __getattr__(self, name: str) -> Any:
            call = getattr(redis, name)

            async def ask(*args: Any, **options: Any) -> Any:
                answer = await call(*args, **options)
                self.asked += 1
                if self.asked == 2:
                    await hand.start(5)
                    await hand.complete(5, 1)
                    await redis.hset(STATE, "status", "completed")  # type: ignore[misc]
                return answer

            return ask

    assert await asyncio.wait_for(printed_reader()(Ending(), J), 10) == ("completed", "")


def test_the_library_loads_neither_arq_nor_an_http_client() -> None:
    code = (
        "import sys, deltafan; print([m for m in ('arq', 'openai', 'aiohttp', 'httpx', 'typer') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
