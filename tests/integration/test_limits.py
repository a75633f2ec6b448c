"""What bounds a job: the length of its answer, its deadline, the number of its runs, the length of the queue."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from redis.asyncio import Redis

from deltafan import Consumer, Generation, JobFailed, Producer, QueueFull, UsageRecord, fold
from deltafan._client import ScriptCall
from deltafan._lua import Script
from deltafan.testing import ScriptedUpstream
from deltafan.testing import chat as script
from deltafan_worker._leased import LeasedWorker
from support.valkey import Valkey
from support.waiting import wait_until
from support.workers import running_worker, settings_env

HI = [{"role": "user", "content": "Hi"}]


async def failure_of(consumer: Consumer, job_id: str) -> tuple[str, Generation]:
    """The code that a job ends with, and what there is of it."""
    with pytest.raises(JobFailed) as caught:
        await consumer.result(job_id, timeout=20)
    failure = caught.value.generation.failure
    assert failure is not None
    return failure.code, caught.value.generation


async def ledger(redis: Redis) -> list[UsageRecord]:
    entries = await redis.xrange("deltafan:usage")
    return [UsageRecord.from_json(orjson.loads(fields[b"data"])) for _, fields in entries]


@pytest.mark.parametrize("who", ["job", "worker"])
async def test_an_endless_answer_is_cut_kept_and_billed(
    who: str,
    producer: Producer,
    consumer: Consumer,
    redis: Redis,
    env: dict[str, str],
    upstream: ScriptedUpstream,
) -> None:
    upstream.then([*[script.delta(content="x" * 100)] * 40, asyncio.Event()])
    env |= {"DELTAFAN_MAX_OUTPUT_BYTES": "2000" if who == "worker" else "1000000"}
    async with running_worker(env):
        limit = 2000 if who == "job" else 5000
        job = await producer.submit(model="sim", messages=HI, max_output_bytes=limit)
        code, generation = await failure_of(consumer, job.id)
        assert code == "output_too_long"
        assert 2000 < len(generation.content) <= 4000
        await asyncio.wait_for(upstream.requests[0].ended.wait(), 5)
        assert upstream.requests[0].was_cut, "the provider is not left streaming"
        await wait_until(lambda: redis.exists("deltafan:usage"), "the bill is written")
        (record,) = await ledger(redis)
        assert (record.outcome, record.source) == ("failed", "estimated")
        assert record.output_tokens == len(generation.content) // 4
    assert len(upstream.requests) == 1, "neither retried nor run again"


async def test_an_endless_answer_in_one_object_is_cut_as_well(
    producer: Producer, consumer: Consumer, redis_url: str, tmp_path: Path
) -> None:
    """A server that ignores the wish for a stream, and never ends."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        with suppress(ConnectionError):
            while True:
                await response.write(b" " * 65_536)
        return response

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    async with (
        TestServer(app) as server,
        running_worker(settings_env(redis_url, str(server.make_url("/v1")), tmp_path)),
    ):
        job = await producer.submit(model="sim", messages=HI, max_output_bytes=1000)
        assert (await failure_of(consumer, job.id))[0] == "output_too_long"


async def test_an_answer_of_just_the_limit_completes(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream
) -> None:
    job = await producer.submit(model="sim", messages=HI, max_output_bytes=len("Hello, world!"))
    assert (await consumer.result(job.id, timeout=10)).content == "Hello, world!"


async def test_a_deadline_that_passed_in_the_queue_costs_no_call(
    producer: Producer, consumer: Consumer, redis: Redis, env: dict[str, str], upstream: ScriptedUpstream
) -> None:
    late = await producer.submit(model="sim", messages=HI, deadline=timedelta(milliseconds=1))
    async with running_worker(env):
        code, generation = await failure_of(consumer, late.id)
        assert (code, generation.usage) == ("deadline_exceeded", None)
        await wait_until(lambda: redis.exists(f"arq:result:{late.id}"), "arq knows")
    assert upstream.requests == []
    assert await ledger(redis) == []


async def test_a_deadline_passes_in_a_retry_pause(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream
) -> None:
    upstream.standing = script.Refuse(429, b"", {"Retry-After": "30"})
    job = await producer.submit(model="sim", messages=HI, deadline=timedelta(seconds=0.5))
    assert (await failure_of(consumer, job.id))[0] == "deadline_exceeded"
    assert len(upstream.requests) == 1


async def test_a_deadline_passes_in_an_outage_of_the_server(
    fresh_valkey: Valkey, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    upstream.then([script.delta(content="Once upon"), asyncio.Event()])
    env = settings_env(fresh_valkey.url, upstream.url, tmp_path)
    async with (
        Producer.connect(fresh_valkey.url) as producer,
        Consumer.connect(fresh_valkey.url) as consumer,
        running_worker(env),
    ):
        job = await producer.submit(model="sim", messages=HI, deadline=timedelta(seconds=1))
        await asyncio.wait_for(upstream.arrived.wait(), 10)
        fresh_valkey.kill()
        await asyncio.wait_for(upstream.requests[0].ended.wait(), 10)
        assert upstream.requests[0].was_cut, "the call ends at the deadline, not with the outage"
        await asyncio.to_thread(fresh_valkey.start)
        code, generation = await failure_of(consumer, job.id)
        assert (code, generation.content) == ("deadline_exceeded", "Once upon")


async def test_a_deadline_passes_while_the_job_waits_out_an_outage(
    fresh_valkey: Valkey, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    env = settings_env(fresh_valkey.url, upstream.url, tmp_path)
    async with Producer.connect(fresh_valkey.url) as producer:
        deadline = datetime.now(UTC) + timedelta(seconds=0.5)
        job = await producer.submit(model="sim", messages=HI, deadline=deadline)
    fresh_valkey.kill()
    async with running_worker(env):
        await wait_until(lambda: datetime.now(UTC) > deadline, "the deadline has passed")
        await asyncio.to_thread(fresh_valkey.start)
        async with Consumer.connect(fresh_valkey.url) as consumer:
            code, _ = await failure_of(consumer, job.id)
    assert code == "deadline_exceeded"
    assert upstream.requests == []


async def test_a_deadline_holds_after_a_hand_over(
    producer: Producer, consumer: Consumer, env: dict[str, str], upstream: ScriptedUpstream
) -> None:
    upstream.then([script.delta(content="first"), asyncio.Event()], [script.delta(content="second"), asyncio.Event()])
    job = await producer.submit(model="sim", messages=HI, deadline=timedelta(seconds=2))
    async with running_worker(env):
        await asyncio.wait_for(upstream.arrived.wait(), 10)
    async with running_worker(env):
        code, generation = await failure_of(consumer, job.id)
    assert (code, generation.content) == ("deadline_exceeded", "second")
    assert len(upstream.requests) == 2


async def test_a_defect_in_a_run_neither_hides_nor_repeats_for_ever(
    producer: Producer,
    consumer: Consumer,
    env: dict[str, str],
    upstream: ScriptedUpstream,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An exception that nobody thought of: arq is not told that the job is done, and the runs are counted."""

    async def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("deltafan_worker._writer.StreamWriter.finish", broken)
    upstream.standing = [script.delta(content="Hi"), script.error("data_inspection_failed", "no")]
    job = await producer.submit(model="sim", messages=HI)
    async with running_worker(env):
        assert (await failure_of(consumer, job.id))[0] == "too_many_attempts"


@pytest.mark.parametrize("place", ["_chat.ChatDecoder._take_delta", "_run.seal"])
async def test_a_defect_costs_one_model_call_and_is_billed(
    producer: Producer,
    consumer: Consumer,
    redis: Redis,
    env: dict[str, str],
    upstream: ScriptedUpstream,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    """What can not be read or written once would break again, and be paid for again."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(f"deltafan_worker.{place}", broken)
    upstream.standing = [script.chunk({"delta": {"content": "Hi"}}, usage=script.USAGE), *script.ending(usage=None)]
    job = await producer.submit(model="sim", messages=HI)
    async with running_worker(env):
        code, generation = await failure_of(consumer, job.id)
        await wait_until(lambda: redis.exists("deltafan:usage"), "the bill is written")
    assert (code, len(upstream.requests)) == ("internal_error", 1)
    assert await ledger(redis) == [generation.usage]
    assert generation.usage is not None
    assert (generation.usage.outcome, generation.usage.input_tokens) == ("failed", 7)
    assert generation.failure is not None
    assert not generation.failure.retryable


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([b'{"error": {"message": "\\ud83d", "code": "invalid_prompt \\ud83d"}}'], "invalid_prompt \ufffd"),
        (
            [b'{"choices": [{"finish_reason": "stop"}], "usage": {"\\ud83d": "\\ud83d", "n": [1%b]}}' % (b"0" * 40)],
            None,
        ),
        ([b'{"choices": [{"delta": {"audio": {"data": "no!!"}}, "finish_reason": "\\ud83d"}]}'], None),
    ],
    ids=["error", "usage", "audio"],
)
async def test_no_value_that_a_provider_sends_keeps_a_job_from_its_end(
    producer: Producer,
    consumer: Consumer,
    worker: LeasedWorker,
    upstream: ScriptedUpstream,
    frames: list[bytes],
    code: str | None,
) -> None:
    upstream.standing = [script.Raw(b"data: " + frame + b"\n\n") for frame in frames]
    job = await producer.submit(model="sim", messages=HI)
    if code is not None:
        assert (await failure_of(consumer, job.id))[0] == code
    else:
        async with consumer.tail(job.id) as events:
            assert fold([event async for event in events]) == await consumer.result(job.id, timeout=10)
    assert len(upstream.requests) == 1


@pytest.mark.parametrize("place", ["_calls.ModelCalls.prepare", "_run.parse_request"])
async def test_a_defect_before_a_run_ends_the_job(
    producer: Producer, consumer: Consumer, env: dict[str, str], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Nothing has counted it yet, so it would be claimed every second for ever."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(f"deltafan_worker.{place}", broken)
    job = await producer.submit(model="sim", messages=HI)
    async with running_worker(env):
        code, _ = await failure_of(consumer, job.id)
    assert code == "internal_error"


@asynccontextmanager
async def limited(place: str, redis_url: str, other: Valkey) -> AsyncIterator[Producer]:
    streams_url = other.url if place == "two servers" else None
    async with Producer.connect(redis_url, streams_url=streams_url, max_queued=3) as producer:
        yield producer


async def keys_of(url: str) -> list[bytes]:
    async with Redis.from_url(url) as client:
        return sorted(await client.keys("*"))


@pytest.mark.parametrize("place", ["one server", "two servers"])
async def test_a_full_queue_refuses_new_jobs_and_forgets_them(
    place: str, redis: Redis, redis_url: str, fresh_valkey: Valkey
) -> None:
    tools = {"tools": [{"type": "function", "function": {"name": "f"}}]}
    async with limited(place, redis_url, fresh_valkey) as producer:
        ids = [f"j{n}" for n in range(5)]
        with pytest.raises(QueueFull) as caught:
            await producer.submit_many({"model": "m", "messages": HI, "job_id": job_id} for job_id in ids)
        error = caught.value
        assert (error.job_id, error.lane, error.waiting, error.limit) == ("j3", "interactive", 3, 3)
        assert (error.code, error.retryable) == ("queue_full", True)
        assert await redis.zrange("deltafan:queue:interactive", 0, -1) == [b"j0", b"j1", b"j2"], "exact in a portion"
        with pytest.raises(QueueFull):
            await producer.submit(model="m", messages=HI, job_id="j5", body=tools)
        streams_url = fresh_valkey.url if place == "two servers" else redis_url
        assert not [key for key in await keys_of(streams_url) if b"{j3}" in key or b"{j4}" in key or b"{j5}" in key]
        known = await producer.submit(model="m", messages=HI, job_id="j0")
        assert not known.created, "what is known already is not refused"
        assert (await producer.submit(model="m", messages=HI, lane="batch")).created, "each lane has room of its own"
        await redis.zadd("deltafan:queue:interactive", {"j0": 9_999_999_999_999})
        assert (await producer.submit(model="m", messages=HI, job_id="j3")).created, "a claimed job does not wait"


async def test_a_refused_job_that_another_submits_meanwhile_is_the_others(
    redis: Redis, redis_url: str, fresh_valkey: Valkey
) -> None:
    """Between the queue's refusal and the withdrawal somebody without a limit submits the same job."""
    async with (
        limited("two servers", redis_url, fresh_valkey) as producer,
        Producer.connect(redis_url, streams_url=fresh_valkey.url) as other,
    ):
        await producer.submit_many([{"model": "m", "messages": HI}] * 3)
        run_many = producer._streams.run_many

        async def interrupted(script: Script, calls: Sequence[ScriptCall], *more: bytes) -> list[Any]:
            if script.name == "withdraw":
                await other.submit(model="m", messages=HI, job_id="j")
            return await run_many(script, calls, *more)

        producer._streams.run_many = interrupted  # type: ignore[method-assign]
        with pytest.raises(QueueFull):
            await producer.submit(model="m", messages=HI, job_id="j")
        async with Redis.from_url(fresh_valkey.url) as streams:
            assert await streams.hget("deltafan:{j}:state", "status") == b"queued"
        assert await redis.zscore("deltafan:queue:interactive", "j") is not None
