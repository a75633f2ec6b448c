"""A real model behind a real server, through both APIs that it speaks."""

import json
from collections.abc import AsyncIterator, Iterator
from itertools import takewhile
from pathlib import Path

import pytest

from deltafan import Consumer, JobCancelled, Producer, fold
from deltafan_cli._local_model import local_model
from deltafan_worker._leased import LeasedWorker
from support.workers import running_worker, settings_env

pytestmark = pytest.mark.model
HI = [{"role": "user", "content": "Tell me about the sea."}]
LIMITS = {"chat": {"max_tokens": 24, "temperature": 0}, "responses": {"max_output_tokens": 24, "temperature": 0}}

WEATHER = {
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
OFFERED = {"chat": {"type": "function", "function": WEATHER}, "responses": {"type": "function", **WEATHER}}


@pytest.fixture(scope="module")
def model_url() -> Iterator[str]:
    with local_model() as url:
        yield url


@pytest.fixture
async def worker(redis_url: str, model_url: str, tmp_path: Path) -> AsyncIterator[LeasedWorker]:
    async with running_worker(settings_env(redis_url, model_url, tmp_path)) as worker:
        yield worker


@pytest.mark.parametrize("api", LIMITS)
async def test_an_answer_is_streamed_and_billed(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, api: str
) -> None:
    job = await producer.submit(model="sim/smollm2", messages=HI, api=api, body=LIMITS[api])
    async with consumer.tail(job.id) as events:
        seen = [event async for event in events]
    result = await consumer.result(job.id)
    assert fold(seen) == result
    assert sum(event.type == "content" for event in seen) > 10, "in pieces, not in one"
    assert result.usage is not None
    assert (result.usage.source, result.usage.output_tokens) == ("provider", 24)
    assert result.usage.input_tokens


async def test_both_apis_say_the_same(producer: Producer, consumer: Consumer, worker: LeasedWorker) -> None:
    said = []
    for api, limits in LIMITS.items():
        job = await producer.submit(model="sim/smollm2", messages=HI, api=api, body=limits)
        result = await consumer.result(job.id, timeout=30)
        assert result.usage is not None
        said.append((result.content, result.usage.input_tokens, result.usage.output_tokens))
    assert said[0] == said[1]


@pytest.mark.parametrize("api", LIMITS)
async def test_an_answer_is_cancelled_in_the_middle(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, api: str
) -> None:
    job = await producer.submit(model="sim/smollm2", messages=HI, api=api)
    async with consumer.tail(job.id) as events:
        async for event in events:
            if event.type == "content":
                break
        await producer.cancel(job.id)
        kinds = [event.type async for event in events]
    assert kinds[-1] == "cancelled"
    assert len(list(takewhile(lambda kind: kind == "content", kinds))) < 100, "long before its end"
    with pytest.raises(JobCancelled) as caught:
        await consumer.result(job.id)
    assert caught.value.generation.content


@pytest.mark.parametrize("api", LIMITS)
async def test_a_tool_is_called_and_its_result_is_answered(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, api: str
) -> None:
    body = {**LIMITS[api], "tools": [OFFERED[api]], "tool_choice": "required"}
    body |= {name: 100 for name in body if name.startswith("max_")}
    ask = [{"role": "user", "content": "Call weather for Paris."}]
    job = await producer.submit(model="sim/smollm2", messages=ask, api=api, body=body)
    async with consumer.tail(job.id) as events:
        pieces = [event.tool_call async for event in events if event.type == "tool_call"]
    assert len(pieces) > 4, "in pieces, not in one"
    asked = await consumer.result(job.id)
    (call,) = asked.tool_calls
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Paris"})
    turn = await producer.submit_tool_results(job, {call.id: "15 degrees"})
    assert (await consumer.result(turn.id, timeout=30)).content
