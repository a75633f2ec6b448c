"""Thinking, tool calls and their results: a conversation of several turns, each a job."""

import asyncio

import pytest

from deltafan import Consumer, InvalidRequest, JobConflict, JobNotFound, Producer
from deltafan.testing import Answer, ScriptedUpstream, ToolCall
from deltafan.testing import chat as script
from deltafan_worker._leased import LeasedWorker
from support.waiting import wait_until

HI = [{"role": "user", "content": "What is the weather in Oslo and Rome?"}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def calling(*cities: str) -> list[script.Step]:
    """Thinking, then a call for each city."""
    calls = [
        {"index": n, "id": f"call_{n}", "type": "function", "function": {"name": "weather", "arguments": f'"{city}"'}}
        for n, city in enumerate(cities)
    ]
    deltas = (script.delta(tool_calls=[call]) for call in calls)
    return [script.delta(content=None, reasoning_content="Let me look."), *deltas, *script.ending("tool_calls")]


async def test_three_phases_are_two_calls(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream
) -> None:
    upstream.then(calling("Oslo", "Rome"), script.text("Rain ", "and sun."))
    options = {"tools": TOOLS, "tool_choice": "required", "temperature": 0}
    job = await producer.submit(model="sim", messages=HI, body=options, tenant="acme")
    asked = await consumer.result(job.id, timeout=10)
    assert (asked.reasoning, [call.name for call in asked.tool_calls]) == ("Let me look.", ["weather"] * 2)
    answer = await producer.submit_tool_results(job, {"call_0": "rain", "call_1": {"sky": "clear"}})
    assert (await consumer.result(answer.id, timeout=10)).content == "Rain and sun."
    sent = upstream.requests[1].body
    assert (sent["temperature"], sent["tools"]) == (0, TOOLS)
    assert "tool_choice" not in sent, "or it would have to call again"
    assert [message["role"] for message in sent["messages"]] == ["user", "assistant", "tool", "tool"]
    assert [call["id"] for call in sent["messages"][1]["tool_calls"]] == ["call_0", "call_1"]
    assert [message["content"] for message in sent["messages"][2:]] == ["rain", '{"sky":"clear"}']


async def test_the_next_turn_of_responses(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream
) -> None:
    calls = [ToolCall(f"call_{number}", "weather", ["{}"]) for number in (0, 1)]
    upstream.then(Answer(calls, finish="tool_calls"))
    body = {"tools": [{"type": "function", "name": "weather"}], "previous_response_id": "resp_0"}
    job = await producer.submit(model="sim", messages=HI, api="responses", body=body)
    asked = await consumer.result(job.id, timeout=10)
    assert asked.usage is not None
    answer = await producer.submit_tool_results(job, {"call_0": "rain", "call_1": "sun"})
    await consumer.result(answer.id, timeout=10)
    sent = upstream.requests[1].body
    assert sent["previous_response_id"] == asked.usage.response_id
    assert [item["output"] for item in sent["input"]] == ["rain", "sun"]


async def test_one_tail_follows_the_whole_conversation(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream
) -> None:
    upstream.then(calling("Oslo"), calling("Rome"), script.text("Rain."))
    job = await producer.submit(model="sim", messages=HI, body={"tools": TOOLS})
    kinds: list[tuple[str, str]] = []

    async def follow() -> None:
        async with consumer.tail_conversation(job.id) as turns:
            async for turn in turns:
                kinds.append((turn.job_id, turn.event.type))

    following = asyncio.create_task(follow())
    jobs = [job.id]
    for _ in range(2):
        await consumer.result(jobs[-1], timeout=10)
        jobs.append((await producer.submit_tool_results(jobs[-1], {"call_0": "rain"})).id)
    await asyncio.wait_for(following, 10)
    turn = ["started", "reasoning", "tool_call", "completed"]
    expected = [(id_, kind) for id_ in jobs[:2] for kind in turn]
    assert kinds == [*expected, *((jobs[2], kind) for kind in ("started", "content", "completed"))]


async def test_answering_again_is_the_same_job_and_answering_otherwise_is_refused(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream
) -> None:
    upstream.then(calling("Oslo"))
    job = await producer.submit(model="sim", messages=HI, body={"tools": TOOLS})
    await consumer.result(job.id, timeout=10)
    first = await producer.submit_tool_results(job, {"call_0": "rain"})
    again = await producer.submit_tool_results(job.id, {"call_0": "rain"})
    assert (again.id, again.created) == (first.id, False)
    with pytest.raises(JobConflict):
        await producer.submit_tool_results(job, {"call_0": "snow"})
    await consumer.result(first.id, timeout=10)
    assert len(upstream.requests) == 2


async def test_what_can_not_be_answered_says_why(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, upstream: ScriptedUpstream
) -> None:
    gate = asyncio.Event()
    upstream.then([gate, *calling("Oslo")], script.text("No need."))
    job = await producer.submit(model="sim", messages=HI, body={"tools": TOOLS})
    await wait_until(lambda: upstream.requests, "the call is made")
    with pytest.raises(InvalidRequest, match="has not ended"):
        await producer.submit_tool_results(job, {"call_0": "rain"})
    gate.set()
    await consumer.result(job.id, timeout=10)
    for results, why in (({}, "there is none for call call_0"), ({"call_0": "", "x": ""}, "'x' is no call")):
        with pytest.raises(InvalidRequest, match=why):
            await producer.submit_tool_results(job, results)
    plain = await producer.submit(model="sim", messages=HI, body={"tools": TOOLS})
    await consumer.result(plain.id, timeout=10)
    with pytest.raises(InvalidRequest, match="without calling a tool"):
        await producer.submit_tool_results(plain, {})
    with pytest.raises(JobNotFound):
        await producer.submit_tool_results("never-submitted", {})
