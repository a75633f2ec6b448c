"""One job from submit to bill, on a real server and over real HTTP."""

import asyncio
from datetime import timedelta
from typing import Any

import orjson
import pytest
from redis.asyncio import Redis

from deltafan import (
    Consumer,
    Event,
    JobCancelled,
    JobFailed,
    Producer,
    ResultTimeout,
    UsageRecord,
    fold,
)
from deltafan.testing import ScriptedUpstream
from deltafan.testing import chat as script
from deltafan_worker._leased import LeasedWorker
from support.waiting import wait_until
from support.workers import running_worker

HI = [{"role": "user", "content": "Hi"}]


async def read(consumer: Consumer, job_id: str, after: str | None = None) -> list[Event]:
    async with consumer.tail(job_id, after=after) as events:
        return [event async for event in events]


async def ledger(redis: Redis) -> list[UsageRecord]:
    entries = await redis.xrange("deltafan:usage")
    return [UsageRecord.from_json(orjson.loads(fields[b"data"])) for _, fields in entries]


async def test_an_answer_reaches_stream_result_ledger_and_arq(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream, redis: Redis
) -> None:
    job = await producer.submit(model="sim", messages=HI, body={"temperature": 0.5}, tenant="acme")
    events = await read(consumer, job.id)
    assert [event.type for event in events] == ["started", "content", "content", "content", "content", "completed"]
    assert [event.position.seq for event in events] == [0, 1, 2, 3, 4, 5]
    assert fold(events).content == "Hello, world!"
    result = await consumer.result(job.id)
    assert result == fold(events)
    assert result.usage is not None
    await wait_until(lambda: redis.exists("deltafan:usage"), "the bill is written")
    assert await ledger(redis) == [result.usage]
    assert (result.usage.input_tokens, result.usage.output_tokens, result.usage.cached_input_tokens) == (7, 5, 2)
    assert result.usage.cost == pytest.approx((5 * 1.0 + 2 * 0.5 + 5 * 2.0) / 1e6)
    assert (result.usage.tenant, result.usage.attempt_no, result.usage.source) == ("acme", 1, "provider")
    assert (result.usage.finish_reason, result.usage.deltas) == ("stop", 4)
    await wait_until(lambda: redis.exists(f"arq:result:{job.id}"), "arq knows")
    assert not await redis.exists(f"arq:job:{job.id}", f"arq:in-progress:{job.id}", f"arq:retry:{job.id}")


async def test_streaming_and_usage_are_forced_and_the_rest_is_passed_through(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream
) -> None:
    job = await producer.submit(model="sim/some/model", messages=HI, body={"stream": False, "enable_thinking": True})
    await consumer.result(job.id, timeout=10)
    assert upstream.requests[0].body == {
        "model": "some/model",
        "messages": HI,
        "enable_thinking": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert "Authorization" not in upstream.requests[0].headers


async def test_three_readers_that_join_at_different_times_see_the_same(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream
) -> None:
    gate = asyncio.Event()
    upstream.then([script.delta(content="one "), gate, script.delta(content="two"), *script.ending()])
    job = await producer.submit(model="sim", messages=HI)
    first = asyncio.create_task(read(consumer, job.id))
    await wait_until(lambda: _has(consumer, job.id, "one "), "the first delta is published")
    second = asyncio.create_task(read(consumer, job.id))
    gate.set()
    live, late = await first, await second
    assert live == late == await read(consumer, job.id)
    assert await read(consumer, job.id, after=str(live[1].position)) == live[2:]


async def _has(consumer: Consumer, job_id: str, content: str) -> bool:
    return (await consumer.snapshot(job_id)).content == content


async def test_thinking_text_refusal_and_tools_keep_their_order(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream
) -> None:
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}}
    more = {"index": 0, "id": "", "function": {"arguments": '{"city": "Oslo"}'}}
    upstream.then(
        [
            script.delta(content=None, reasoning_content="Hm. "),
            script.delta(content="Let me see.", reasoning_content="Weather."),
            script.delta(tool_calls=[call]),
            script.delta(tool_calls=[more]),
            *script.ending("tool_calls"),
        ]
    )
    result = await consumer.result((await producer.submit(model="sim", messages=HI)).id, timeout=10)
    assert (result.reasoning, result.content, result.finish_reason) == ("Hm. Weather.", "Let me see.", "tool_calls")
    assert [(c.id, c.name, c.arguments) for c in result.tool_calls] == [("call_1", "weather", '{"city": "Oslo"}')]


async def test_a_refused_request_fails_with_the_providers_words(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream, redis: Redis
) -> None:
    body = b'{"error": {"message": "temperature must be below 2", "type": "invalid_request_error", "code": null}}'
    upstream.then(script.Refuse(400, body))
    job = await producer.submit(model="sim", messages=HI, body={"temperature": 3})
    with pytest.raises(JobFailed, match="temperature must be below 2") as caught:
        await consumer.result(job.id, timeout=10)
    assert caught.value.generation.failure is not None
    assert caught.value.generation.failure.code == "invalid_request_error"
    assert len(upstream.requests) == 1
    await wait_until(lambda: redis.exists("deltafan:usage"), "the failed call is in the ledger")
    assert [(r.outcome, r.source) for r in await ledger(redis)] == [("failed", "none")]


@pytest.mark.parametrize("refusal", [script.Refuse(503), script.Refuse(429, b"", {"Retry-After": "0"})])
async def test_before_the_first_delta_a_call_is_retried_in_place(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream, refusal: script.Refuse
) -> None:
    upstream.then(refusal)
    job = await producer.submit(model="sim", messages=HI)
    events = await read(consumer, job.id)
    assert fold(events).content == "Hello, world!"
    assert [event.type for event in events].count("started") == 1
    assert len(upstream.requests) == 2


@pytest.mark.parametrize("hears", [True, False], ids=["noted at once", "noted at the end"])
async def test_each_call_that_was_made_has_a_record_of_its_own(
    producer: Producer,
    consumer: Consumer,
    env: dict[str, str],
    upstream: ScriptedUpstream,
    redis: Redis,
    monkeypatch: pytest.MonkeyPatch,
    hears: bool,
) -> None:
    """A model that was given up before its first delta may have cost something; a request that was refused has not."""
    gate = asyncio.Event()
    upstream.then([asyncio.Event()], script.Refuse(503), [gate, *script.text("Hi")])
    state = "deltafan:{j}:state"
    if not hears:
        monkeypatch.setattr("deltafan_worker._writer.StreamWriter._note", lambda *_: None)
    async with running_worker(env):
        await producer.submit(model="sim", messages=HI, job_id="j", timeouts={"first_delta_s": 0.3})
        await wait_until(lambda: len(upstream.requests) == 3, "the third request is made")
        fields: Any = await redis.hgetall(state)  # type: ignore[misc]
        calls = [name for name in fields if name.startswith(b"u:")]
        assert len(calls) == 1 + hears, "should the worker vanish now, both calls are billed"
        gate.set()
        assert (await consumer.result("j", timeout=10)).content == "Hi"
        await wait_until(lambda: redis.exists("arq:result:j"), "the job is closed")
    records = await ledger(redis)
    assert sorted((r.outcome, r.source, r.attempt_no) for r in records) == [
        ("completed", "provider", 1),
        ("failed", "none", 1),
    ]
    assert len({record.call_id for record in records}) == 2
    assert [record.cost_note for record in records if record.source == "none"] == ["nobody has told what was used"]


async def test_a_call_that_was_made_is_billed_although_its_job_goes_back_to_wait(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream, redis: Redis
) -> None:
    upstream.then([asyncio.Event()])
    job = await producer.submit(model="narrow/x", messages=HI, lane="batch", timeouts={"first_delta_s": 0.2})
    await consumer.result(job.id, timeout=20)
    await wait_until(lambda: redis.exists(f"arq:result:{job.id}"), "the job is closed")
    assert sorted((r.outcome, r.attempt_no) for r in await ledger(redis)) == [("completed", 1), ("failed", 1)]


async def test_after_the_first_delta_a_broken_answer_starts_over_visibly(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream, redis: Redis
) -> None:
    upstream.then([script.delta(content="Goodb"), script.Cut()])
    job = await producer.submit(model="sim", messages=HI)
    events = await read(consumer, job.id)
    started = [event.started for event in events if event.started]
    assert [(s.mode, s.attempt_no) for s in started] == [("fresh", 1), ("restart", 2)]
    assert fold(events).content == "Hello, world!"
    await wait_until(lambda: redis.exists("deltafan:usage"), "the bills are written")
    assert sorted((r.attempt_no, r.outcome, r.source) for r in await ledger(redis)) == [
        (1, "interrupted", "estimated"),
        (2, "completed", "provider"),
    ]


async def test_three_broken_answers_are_enough(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream
) -> None:
    upstream.standing = [script.delta(content="Goodb"), script.Cut()]
    job = await producer.submit(model="sim", messages=HI)
    with pytest.raises(JobFailed, match="broke") as caught:
        await consumer.result(job.id, timeout=10)
    assert len(upstream.requests) == 3
    assert caught.value.generation.content == "Goodb"


async def test_on_interrupt_fail_forbids_the_restart(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream
) -> None:
    upstream.standing = [script.delta(content="Goodb"), script.Cut()]
    job = await producer.submit(model="sim", messages=HI, on_interrupt="fail")
    with pytest.raises(JobFailed):
        await consumer.result(job.id, timeout=10)
    assert len(upstream.requests) == 1


async def test_cancel_stops_a_running_job_and_closes_its_call(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream, redis: Redis
) -> None:
    upstream.then([script.delta(content="Once upon"), asyncio.Event()])
    job = await producer.submit(model="sim", messages=HI)
    await wait_until(lambda: _has(consumer, job.id, "Once upon"), "the first delta is published")
    assert await producer.cancel(job.id, reason="the user left") == "requested"
    with pytest.raises(JobCancelled, match="the user left") as caught:
        await consumer.result(job.id, timeout=10)
    assert caught.value.generation.content == "Once upon"
    await asyncio.wait_for(upstream.requests[0].ended.wait(), 5)
    assert upstream.requests[0].was_cut
    assert await producer.cancel(job.id) == "ended"
    await wait_until(lambda: redis.exists("deltafan:usage"), "the bill is written")
    assert [(r.outcome, r.source, r.output_tokens) for r in await ledger(redis)] == [("cancelled", "estimated", 3)]


async def test_a_waiting_job_is_cancelled_at_once_and_never_run(
    producer: Producer, consumer: Consumer, env: dict[str, str], upstream: ScriptedUpstream, redis: Redis
) -> None:
    job = await producer.submit(model="sim", messages=HI)
    assert await producer.cancel(job.id) == "cancelled"
    events = await read(consumer, job.id)
    assert [event.type for event in events] == ["cancelled"]
    async with running_worker(env):
        await wait_until(lambda: redis.exists(f"arq:result:{job.id}"), "the queue is told")
    assert upstream.requests == []


async def test_a_deadline_ends_a_running_job(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream
) -> None:
    upstream.then([script.delta(content="Once upon"), asyncio.Event()])
    job = await producer.submit(model="sim", messages=HI, deadline=timedelta(seconds=0.3))
    with pytest.raises(JobFailed, match="deadline"):
        await consumer.result(job.id, timeout=10)


async def test_an_unknown_model_fails_with_what_to_do(
    producer: Producer, consumer: Consumer, worker: LeasedWorker
) -> None:
    job = await producer.submit(model="smi", messages=HI)
    with pytest.raises(JobFailed, match="did you mean sim"):
        await consumer.result(job.id, timeout=10)


async def test_a_missing_key_is_named(producer: Producer, consumer: Consumer, worker: LeasedWorker) -> None:
    job = await producer.submit(model="keyed/x", messages=HI)
    with pytest.raises(JobFailed, match="SIM_KEY"):
        await consumer.result(job.id, timeout=10)


async def test_waiting_for_a_result_can_time_out_and_be_repeated(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream
) -> None:
    gate = asyncio.Event()
    upstream.then([script.delta(content="Hi"), gate, *script.ending()])
    job = await producer.submit(model="sim", messages=HI)
    with pytest.raises(ResultTimeout):
        await consumer.result(job.id, timeout=0.2)
    gate.set()
    assert (await consumer.result(job.id, timeout=10)).content == "Hi"
