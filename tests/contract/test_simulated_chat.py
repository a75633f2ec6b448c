"""The vendor's own SDK reads our simulated Chat Completions as it reads real ones."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import openai
import orjson
import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionChunk

from deltafan.testing import (
    Answer,
    Audio,
    Fault,
    Part,
    Reasoning,
    Refusal,
    ScriptedUpstream,
    Text,
    Tokens,
    ToolCall,
    scripted_upstream,
)
from deltafan.testing import chat as script
from deltafan_cli._local_model import MODEL, local_model

BENCH = str(Path(__file__).parents[2] / "bench/upstream.py")


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with scripted_upstream() as upstream:
        yield upstream


@pytest.fixture
async def sdk(upstream: ScriptedUpstream) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(api_key="key", base_url=upstream.url, max_retries=0) as sdk:
        yield sdk


async def read(sdk: AsyncOpenAI, model: str = "sim", **options: Any) -> list[ChatCompletionChunk]:
    stream = await sdk.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Say hi"}],
        stream=True,
        stream_options={"include_usage": True},
        **options,
    )
    return [chunk async for chunk in stream]


def joined(chunks: list[ChatCompletionChunk], name: str) -> str:
    return "".join(getattr(choice.delta, name, None) or "" for chunk in chunks for choice in chunk.choices)


async def test_text_reasoning_and_refusal(sdk: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    deltas = [script.delta(reasoning_content="Hm. "), script.delta(content="No, "), script.delta(refusal="sorry")]
    upstream.then([script.opening(), *deltas, *script.ending("content_filter")])
    chunks = await read(sdk)
    assert [joined(chunks, name) for name in ("reasoning_content", "content", "refusal")] == ["Hm. ", "No, ", "sorry"]
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["content_filter"]


async def test_tool_calls(sdk: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    first = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}}
    pieces = [{"index": 0, "function": {"arguments": piece}} for piece in ('{"city":', ' "Oslo"}')]
    upstream.then([*(script.delta(tool_calls=[call]) for call in (first, *pieces)), *script.ending("tool_calls")])
    calls = [c for chunk in await read(sdk) for choice in chunk.choices for c in choice.delta.tool_calls or []]
    assert (calls[0].id, calls[0].function and calls[0].function.name) == ("call_1", "weather")
    assert json.loads("".join(c.function.arguments or "" for c in calls if c.function)) == {"city": "Oslo"}


@pytest.mark.parametrize("usage", [script.USAGE, {**script.USAGE, "prompt_tokens_details": None}, None])
async def test_usage_is_what_the_script_says_or_none(
    sdk: AsyncOpenAI, upstream: ScriptedUpstream, usage: dict[str, Any] | None
) -> None:
    upstream.then(script.text("Hi", usage=usage))
    found = [chunk.usage for chunk in await read(sdk) if chunk.usage]
    assert [one.model_dump(exclude_unset=True) for one in found] == ([usage] if usage else [])


@pytest.mark.parametrize("cutting", [script.byte_by_byte, lambda steps: [script.at_once(steps)]])
async def test_how_it_is_cut_into_writes_changes_nothing(
    sdk: AsyncOpenAI, upstream: ScriptedUpstream, cutting: Callable[..., Any]
) -> None:
    steps = script.text("Grüße, ", "世界", " 🦞")
    upstream.then(steps, [*cutting(steps)])
    assert await read(sdk) == await read(sdk)


async def test_comments_and_a_missing_done_are_no_trouble(sdk: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    upstream.then([script.COMMENT, script.delta(content="Hi"), script.COMMENT, *script.ending()[:-1]])
    assert joined(await read(sdk), "content") == "Hi"


@pytest.mark.parametrize(
    ("status", "error"),
    [(429, openai.RateLimitError), (400, openai.BadRequestError), (500, openai.InternalServerError)],
)
async def test_a_refusal_has_the_vendors_class_words_and_headers(
    sdk: AsyncOpenAI, upstream: ScriptedUpstream, status: int, error: type[openai.APIStatusError]
) -> None:
    body = {"error": {"message": "slow down", "type": "requests", "code": "limited"}}
    upstream.then(script.Refuse(status, orjson.dumps(body), {"Retry-After": "7", "Content-Type": "application/json"}))
    with pytest.raises(error, match="slow down") as caught:
        await read(sdk)
    assert (caught.value.code, caught.value.response.headers["retry-after"]) == ("limited", "7")


async def test_a_refused_call_can_be_repeated(sdk: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    upstream.then(script.Refuse(429, b"{}", {"Retry-After-Ms": "1"}))
    chunks = await read(sdk.with_options(max_retries=1))
    assert joined(chunks, "content") == "Hello, world!"
    assert len(upstream.requests) == 2


async def test_an_error_may_come_in_the_middle_of_a_200(sdk: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    failure = {"error": {"message": "overloaded", "type": "server_error", "code": None}}
    upstream.then([script.delta(content="Hi"), failure])
    with pytest.raises(openai.APIError, match="overloaded"):
        await read(sdk)


async def test_a_broken_connection_is_no_end(sdk: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    half = script.Raw(script.frame(script.delta(content="torn"))[:40])
    upstream.then([script.delta(content="Hi"), half, script.Cut()])
    with pytest.raises(openai.APIConnectionError):
        await read(sdk)


async def test_leaving_a_stream_closes_the_connection(sdk: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    upstream.then([script.delta(content="Hi"), asyncio.Event()])
    stream = await sdk.chat.completions.create(model="sim", messages=[{"role": "user", "content": "Hi"}], stream=True)
    assert (await anext(aiter(stream))).choices[0].delta.content == "Hi"
    await stream.close()
    await asyncio.wait_for(upstream.requests[0].ended.wait(), 5)
    assert upstream.requests[0].was_cut


@pytest.mark.parametrize("dialect", ["openai", "dashscope"])
async def test_what_the_sdk_accumulates_is_what_the_answer_says(
    sdk: AsyncOpenAI, upstream: ScriptedUpstream, dialect: str
) -> None:
    parts: list[Part] = [Reasoning("Hm. "), Reasoning("So."), Text("Grüße, "), Text("世界")]
    calls = [ToolCall("call_1", "weather", ['{"city":', ' "Oslo"}']), ToolCall("call_2", "time", ["{}"])]
    answer = Answer([*parts, *calls], "tool_calls", Tokens(20, 10, cached_input=4, cache_write=3, reasoning=6))
    upstream.then(answer)
    url = upstream.url if dialect == "openai" else upstream.compatible_url
    client = sdk.with_options(base_url=url)
    options = {"include_usage": True}
    hi: Any = [{"role": "user", "content": "Hi"}]
    async with client.chat.completions.stream(model="some-model", messages=hi, stream_options=options) as stream:  # type: ignore[arg-type]
        completion = await stream.get_final_completion()
    [choice] = completion.choices
    assert (choice.message.content, choice.finish_reason, completion.model) == (answer.text, "tool_calls", "some-model")
    assert choice.message.reasoning_content == answer.reasoning  # type: ignore[attr-defined]
    found = [(call.id, call.function.name, call.function.arguments) for call in choice.message.tool_calls or []]
    assert found == [("call_1", "weather", '{"city": "Oslo"}'), ("call_2", "time", "{}")]
    assert completion.usage is not None
    usage = completion.usage.model_dump(exclude_unset=True)
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (20, 10, 30)
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 6}
    details = usage["prompt_tokens_details"]
    assert (details["cached_tokens"], details.get("cache_write_tokens") or details["cache_creation_input_tokens"]) == (
        4,
        3,
    )


async def test_an_answer_that_refuses(sdk: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    upstream.then(Answer([Refusal("I'm "), Refusal("sorry")]))
    chunks = await read(sdk)
    assert (joined(chunks, "refusal"), joined(chunks, "content")) == ("I'm sorry", "")


async def test_sound_ends_with_an_update_after_the_finish(sdk: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    upstream.then(Answer([Audio(b"\x01\x02", "Hi")]))
    chunks = await read(sdk)
    sound = [choice.delta.audio for chunk in chunks for choice in chunk.choices if choice.delta.audio]
    assert [update.model_dump(exclude_unset=True) for update in sound] == [
        {"id": "audio_1", "transcript": "Hi"},
        {"id": "audio_1", "data": "AQI="},
        {"expires_at": 1},
    ]


@pytest.mark.parametrize("is_wanted", [True, False])
async def test_an_answer_has_usage_only_for_those_who_ask(
    sdk: AsyncOpenAI, upstream: ScriptedUpstream, *, is_wanted: bool
) -> None:
    stream = await sdk.chat.completions.create(
        model="sim",
        messages=[{"role": "user", "content": "Hi"}],
        stream=True,
        stream_options={"include_usage": is_wanted},
    )
    assert any([chunk.usage async for chunk in stream]) is is_wanted


async def test_without_stream_the_answer_is_one_object(sdk: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    call = ToolCall("call_1", "weather", ["{", "}"])
    upstream.then(Answer([Text("Hi"), call], "tool_calls"), Answer([Fault("server_error", "overloaded", 503)]))
    messages: Any = [{"role": "user", "content": "Hi"}]
    completion = await sdk.chat.completions.create(model="sim", messages=messages)
    [choice] = completion.choices
    assert (choice.message.content, choice.finish_reason) == ("Hi", "tool_calls")
    assert [found.id for found in choice.message.tool_calls or []] == ["call_1"]
    with pytest.raises(openai.InternalServerError, match="overloaded"):
        await sdk.chat.completions.create(model="sim", messages=messages)


async def test_a_fault_is_an_error_object_or_dashscopes_error_finish(
    sdk: AsyncOpenAI, upstream: ScriptedUpstream
) -> None:
    answer = Answer([Text("Hi"), Fault("Throttling", 'too "fast"', 429), Text("never")])
    upstream.then(answer, answer)
    with pytest.raises(openai.APIError, match='too "fast"'):
        await read(sdk)
    *_, last = await read(sdk.with_options(base_url=upstream.compatible_url))
    assert str(last.choices[0].finish_reason) == "error_finish"
    frame = script.error_finish("Throttling", 'too "fast"')
    assert isinstance(frame, dict)
    assert last.choices[0].delta.content == frame["choices"][0]["delta"]["content"]
    assert ":HTTP_STATUS/429\n" in str(last.choices[0].delta.content)


@contextmanager
def program(*arguments: str) -> Iterator[str]:
    """The URL of a simulator that runs as a process."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, *arguments], text=True, **pipes) as process:  # type: ignore[call-overload]
        yield json.loads(process.stdout.readline())["url"]
        process.stdin.close()
        process.wait(10)


@pytest.mark.parametrize(
    ("server", "model"),
    [
        pytest.param(lambda: program("-m", "deltafan.testing"), "sim-8x1", id="simulator"),
        pytest.param(lambda: program(BENCH), "bench-8-1-1", id="bench alone"),
        pytest.param(lambda: program(BENCH), "bench-8-0-3", id="bench in bursts"),
        pytest.param(local_model, MODEL, id="llama.cpp", marks=pytest.mark.model),
    ],
)
async def test_an_answer_has_the_same_shape_from_every_server(
    server: Callable[[], AbstractContextManager[str]], model: str
) -> None:
    """The real server is held to the same words, so that the simulators do not drift from it."""
    with server() as url:
        async with AsyncOpenAI(api_key="key", base_url=url, max_retries=0) as sdk:
            # Twice: the second request comes on the connection of the first.
            for _ in range(2):
                *body, last = await read(sdk, model, max_tokens=8)
                assert len({chunk.id for chunk in body}) == 1
                assert {chunk.object for chunk in body} == {"chat.completion.chunk"}
                assert [len(chunk.choices) for chunk in body] == [1] * len(body)
                assert [bool(chunk.choices[0].finish_reason) for chunk in body] == [False] * (len(body) - 1) + [True]
                assert not any(chunk.usage for chunk in body)
                assert joined(body, "content")
                assert last.choices == []
                assert last.usage is not None
                assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens
