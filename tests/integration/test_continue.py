"""Answers that broke off and are gone on with, so that nobody reads or pays for their beginning twice."""

import asyncio
from typing import Any

import orjson
import pytest
from redis.asyncio import Redis

from deltafan import Consumer, Event, JobFailed, Producer, UsageRecord, fold
from deltafan.testing import Answer, Cut, Reasoning, Refuse, ScriptedUpstream, Text, ToolCall
from deltafan_worker._leased import LeasedWorker
from support.waiting import wait_until
from support.workers import running_worker, worker_process

HI = [{"role": "user", "content": "Tell me a story."}]


async def read(consumer: Consumer, job_id: str) -> list[Event]:
    async with consumer.tail(job_id) as events:
        return [event async for event in events]


def modes(events: list[Event]) -> list[str]:
    return [event.started.mode for event in events if event.started]


async def ledger(redis: Redis) -> list[tuple[int, str]]:
    entries = await redis.xrange("deltafan:usage")
    records = [UsageRecord.from_json(orjson.loads(fields[b"data"])) for _, fields in entries]
    return sorted((record.attempt_no, record.outcome) for record in records)


@pytest.mark.parametrize(
    ("provider", "message", "options"),
    [
        ("partial", {"partial": True}, {}),
        ("prefix", {"prefix": True}, {}),
        ("vllm", {}, {"continue_final_message": True, "add_generation_prompt": False}),
    ],
)
async def test_the_rest_of_an_answer_is_asked_for(
    producer: Producer,
    consumer: Consumer,
    worker: LeasedWorker,
    upstream: ScriptedUpstream,
    redis: Redis,
    provider: str,
    message: dict[str, Any],
    options: dict[str, Any],
) -> None:
    upstream.then(
        Answer([Text("Once"), Text(" upon"), Cut()]), Answer([Text(" a"), Cut()]), Answer([Text(" time"), Text(".")])
    )
    job = await producer.submit(model=f"{provider}/x", messages=HI, on_interrupt="continue")
    events = await read(consumer, job.id)
    assert modes(events) == ["fresh", "continue", "continue"]
    assert "".join(event.text for event in events) == "Once upon a time.", "no reader sees anything twice"
    assert fold(events).content == "Once upon a time."
    assert await consumer.result(job.id) == fold(events)
    second, third = events[3].started, events[5].started
    assert (second and second.from_, third and third.from_) == (events[2].position, events[4].position)
    asked = upstream.requests[2].body
    assert asked["messages"] == [*HI, {"role": "assistant", "content": "Once upon a", **message}]
    assert {name: asked[name] for name in options} == options
    await wait_until(lambda: redis.exists("deltafan:usage"), "the bills are written")
    assert await ledger(redis) == [(1, "interrupted"), (2, "interrupted"), (3, "completed")]


async def test_another_worker_goes_on_where_a_killed_one_stopped(
    producer: Producer, consumer: Consumer, env: dict[str, str], upstream: ScriptedUpstream, redis: Redis
) -> None:
    upstream.then(Answer([Text("Once"), Text(" upon"), asyncio.Event()]), Answer([Text(" a time.")]))
    with worker_process(env) as killed:
        job = await producer.submit(model="partial/x", messages=HI, on_interrupt="continue")
        async with consumer.tail(job.id) as tail:
            async for event in tail:
                if event.text == " upon":
                    break
        killed.kill()
        async with running_worker(env):
            events = await read(consumer, job.id)
            await wait_until(lambda: redis.exists("deltafan:usage"), "the bills are written")
    assert modes(events) == ["fresh", "continue"]
    assert "".join(event.text for event in events) == "Once upon a time."
    assert await ledger(redis) == [(1, "lost"), (2, "completed")]


@pytest.mark.parametrize(
    ("model", "beginning"),
    [
        ("sim", [Text("Once")]),
        ("partial/x", [Reasoning("Hm."), Text("Once")]),
        ("partial/x", [Text("Once"), ToolCall("call_1", "f", ["{"])]),
    ],
)
async def test_what_can_not_be_gone_on_with_starts_over_and_says_so(
    producer: Producer,
    consumer: Consumer,
    worker: LeasedWorker,
    upstream: ScriptedUpstream,
    model: str,
    beginning: list[Any],
) -> None:
    upstream.then(Answer([*beginning, Cut()]))
    job = await producer.submit(model=model, messages=HI, on_interrupt="continue")
    events = await read(consumer, job.id)
    assert modes(events) == ["fresh", "restart"]
    assert fold(events).content == "Hello, world!"


async def test_going_on_is_bounded_too(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream
) -> None:
    upstream.standing = Answer([Text("a"), Cut()])
    job = await producer.submit(model="partial/x", messages=HI, on_interrupt="continue")
    with pytest.raises(JobFailed) as caught:
        await consumer.result(job.id, timeout=10)
    assert (caught.value.generation.content, len(upstream.requests)) == ("aaa", 3)


async def test_a_stream_that_is_lost_is_written_again_with_its_beginning(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream, redis: Redis
) -> None:
    gate = asyncio.Event()
    upstream.then(Answer([Text("Once"), Cut()]), Answer([Text(" upon"), gate, Text(" a time.")]))
    job = await producer.submit(model="partial/x", messages=HI, on_interrupt="continue")
    async with consumer.tail(job.id) as tail:
        async for event in tail:
            if event.text == " upon":
                break
    await redis.delete(f"deltafan:{{{job.id}}}:events")
    gate.set()
    events = await read(consumer, job.id)
    assert modes(events) == ["replay"]
    assert fold(events).content == "Once upon a time."
    assert await consumer.result(job.id) == fold(events)


async def test_a_background_response_is_read_on_after_a_cut(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream, redis: Redis
) -> None:
    gate = asyncio.Event()
    upstream.then(Answer([Text("Once"), Text(" upon"), gate, Text(" a"), Text(" time.")]))
    upstream.then_refuse_retrieving(Refuse(503))
    job = await producer.submit(
        model="background/x", messages=HI, api="responses", on_interrupt="continue", timeouts={"silence_s": 0.4}
    )
    await wait_until(lambda: len(upstream.requests) > 2, "the silent connection is given up for others")
    gate.set()
    events = await read(consumer, job.id)
    assert [event.type for event in events] == ["started", *["content"] * 4, "completed"]
    assert fold(events).content == "Once upon a time."
    first, *others = upstream.requests
    assert (first.body["background"], first.body["store"]) == (True, True)
    assert {(other.method, other.query["stream"]) for other in others} == {("GET", "true")}
    assert others[-1].query["starting_after"] != "0", "only what was not read yet is asked for"
    await wait_until(lambda: redis.exists("deltafan:usage"), "the bill is written")
    assert await ledger(redis) == [(1, "completed")]


@pytest.mark.parametrize("said", [[Text("Once"), Text(" upon")], []])
async def test_another_worker_reads_on_in_the_same_response(
    producer: Producer,
    consumer: Consumer,
    env: dict[str, str],
    upstream: ScriptedUpstream,
    redis: Redis,
    said: list[Any],
) -> None:
    gate = asyncio.Event()
    upstream.then(Answer([Reasoning("Hm."), *said, gate, Text(" a time.")]))
    with worker_process(env) as killed:
        request: dict[str, Any] = {
            "model": "background/x",
            "messages": HI,
            "api": "responses",
            "on_interrupt": "continue",
        }
        job = await producer.submit(**request)
        async with consumer.tail(job.id) as tail:
            async for event in tail:
                if event.text == (said[-1].text if said else "Hm."):
                    break
        killed.kill()
        async with running_worker(env):
            await wait_until(lambda: len(upstream.requests) > 1, "another worker asks for the response")
            gate.set()
            events = await read(consumer, job.id)
            await wait_until(lambda: redis.exists("deltafan:usage"), "the bill is written")
    assert modes(events) == ["fresh", "continue"]
    assert "".join(event.text for event in events if event.type == "content") == fold(events).content
    assert fold(events).reasoning == "Hm."
    assert [request.method for request in upstream.requests] == ["POST", "GET"], "the model was called once"
    assert await ledger(redis) == [(2, "completed")], "and billed once"


async def test_a_cancelled_background_response_is_ended_upstream(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream
) -> None:
    upstream.then(Answer([Text("Once"), asyncio.Event()]))
    request: dict[str, Any] = {"model": "background/x", "messages": HI, "api": "responses", "on_interrupt": "continue"}
    job = await producer.submit(**request)
    async with consumer.tail(job.id) as tail:
        async for event in tail:
            if event.text:
                break
    await producer.cancel(job.id)
    await wait_until(lambda: upstream.requests[-1].path.endswith("/cancel"), "the provider is told")


async def test_a_response_that_is_gone_is_generated_anew(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream
) -> None:
    upstream.then(Answer([Text("Once"), Cut()]))
    upstream.then_refuse_retrieving(Refuse(404))
    request: dict[str, Any] = {"model": "background/x", "messages": HI, "api": "responses", "on_interrupt": "continue"}
    job = await producer.submit(**request)
    events = await read(consumer, job.id)
    assert modes(events) == ["fresh", "restart"]
    assert fold(events).content == "Hello, world!"


async def test_a_response_that_is_gone_when_another_worker_looks_is_generated_anew(
    producer: Producer, consumer: Consumer, env: dict[str, str], upstream: ScriptedUpstream, redis: Redis
) -> None:
    upstream.then(Answer([Text("Once"), asyncio.Event()]))
    upstream.then_refuse_retrieving(Refuse(404))
    with worker_process(env) as killed:
        job = await producer.submit(model="background/x", messages=HI, api="responses", on_interrupt="continue")
        async with consumer.tail(job.id) as tail:
            async for event in tail:
                if event.text:
                    break
        killed.kill()
        async with running_worker(env):
            events = await read(consumer, job.id)
            await wait_until(lambda: redis.exists("deltafan:usage"), "the bill is written")
    assert modes(events)[-1] == "restart"
    assert fold(events).content == "Hello, world!"
    assert [outcome for _, outcome in await ledger(redis)] == ["interrupted", "completed"]


async def test_a_response_that_can_not_be_reached_for_long_is_read_on_in_the_next_attempt(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream, redis: Redis
) -> None:
    upstream.then(Answer([Text("Once"), Cut(), Text(" upon a time.")]))
    for _ in range(4):
        upstream.then_refuse_retrieving(Refuse(503))
    job = await producer.submit(model="background/x", messages=HI, api="responses", on_interrupt="continue")
    events = await read(consumer, job.id)
    assert modes(events)[-1] == "continue"
    assert fold(events).content == "Once upon a time."
    assert [request.method for request in upstream.requests].count("POST") == 1, "the model was called once"
    await wait_until(lambda: redis.exists("deltafan:usage"), "the bill is written")
    assert [outcome for _, outcome in await ledger(redis)] == ["completed"], "and billed once"


async def test_a_response_whose_worker_died_is_ended_with_its_job(
    producer: Producer, consumer: Consumer, env: dict[str, str], upstream: ScriptedUpstream
) -> None:
    upstream.then(Answer([Text("Once"), asyncio.Event()]))
    with worker_process(env) as killed:
        job = await producer.submit(model="background/x", messages=HI, api="responses", on_interrupt="continue")
        async with consumer.tail(job.id) as tail:
            async for event in tail:
                if event.text:
                    break
        killed.kill()
        await producer.cancel(job.id)
        async with running_worker(env):
            await wait_until(lambda: upstream.requests[-1].path.endswith("/cancel"), "the provider is told")


async def test_a_response_is_ended_before_another_is_made_in_its_place(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream
) -> None:
    upstream.then(Answer([asyncio.Event()]))
    for _ in range(4):
        upstream.then_refuse_retrieving(Refuse(503))
    job = await producer.submit(
        model="background/x",
        messages=HI,
        api="responses",
        on_interrupt="continue",
        timeouts={"first_delta_s": 0.3},
    )
    assert (await consumer.result(job.id, timeout=20)).content == "Hello, world!"
    paths = [(request.method, request.path.rpartition("/")[2]) for request in upstream.requests]
    posts = [index for index, (method, end) in enumerate(paths) if (method, end) == ("POST", "responses")]
    assert ("POST", "cancel") in paths[posts[0] : posts[1]]
