"""The vendor's own SDK reads our simulated Responses API as it reads the real one."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.responses import Response, ResponseStreamEvent

from deltafan.testing import (
    Answer,
    Audio,
    Fault,
    Reasoning,
    Refusal,
    ScriptedUpstream,
    Text,
    Tokens,
    ToolCall,
    scripted_upstream,
)
from deltafan.testing import responses as script

EVERYTHING = Answer(
    [
        Reasoning("Hm. "),
        Reasoning("Weather."),
        Text("Let me "),
        Text("see 世界."),
        ToolCall("call_1", "weather", ['{"city":', ' "Oslo"}']),
        ToolCall("call_2", "time"),
        Refusal("Not "),
        Refusal("that."),
    ],
    "tool_calls",
    Tokens(20, 10, cached_input=4, cache_write=3, reasoning=6),
)


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with scripted_upstream() as upstream:
        yield upstream


@pytest.fixture
async def sdk(upstream: ScriptedUpstream) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(api_key="key", base_url=upstream.url, max_retries=0) as sdk:
        yield sdk


@pytest.fixture
async def compatible(upstream: ScriptedUpstream) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(api_key="key", base_url=upstream.compatible_url, max_retries=0) as sdk:
        yield sdk


async def read(sdk: AsyncOpenAI, **options: Any) -> list[ResponseStreamEvent]:
    stream = await sdk.responses.create(model="sim", input="Say hi", stream=True, **options)
    return [event async for event in stream]


def joined(events: list[ResponseStreamEvent], kind: str, field: str = "delta") -> str:
    return "".join(getattr(event, field) for event in events if event.type == kind)


def final(events: list[ResponseStreamEvent]) -> Response:
    response = getattr(events[-1], "response", None)
    assert isinstance(response, Response)
    return response


async def test_a_text_has_the_whole_sequence_of_events(sdk: AsyncOpenAI) -> None:
    events = await read(sdk)
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * 4,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == [*range(12)]
    assert joined(events, "response.output_text.delta") == "Hello, world!" == final(events).output_text
    usage = final(events).usage
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (7, 5, 12)
    assert usage.input_tokens_details.cached_tokens == 2
    assert (final(events).id, final(events).model, final(events).status) == ("resp_1", "sim", "completed")


async def test_what_the_sdk_accumulates_is_what_the_answer_says(sdk: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    upstream.then(EVERYTHING)
    async with sdk.responses.stream(model="sim", input="Hi") as stream:
        events = [event async for event in stream]
        response = await stream.get_final_response()
    assert response.output_text == EVERYTHING.text == "Let me see 世界."
    calls = [item for item in response.output if item.type == "function_call"]
    assert [(call.call_id, call.name, call.arguments) for call in calls] == [
        ("call_1", "weather", '{"city": "Oslo"}'),
        ("call_2", "time", ""),
    ]
    told = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert [event.arguments for event in told] == ['{"city": "Oslo"}', ""]
    refused = [
        part.refusal
        for item in response.output
        if item.type == "message"
        for part in item.content
        if part.type == "refusal"
    ]
    assert refused == [EVERYTHING.refusal]
    usage = response.usage
    assert usage is not None
    assert usage.model_dump(exclude_unset=True) == {
        "input_tokens": 20,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 3},
        "output_tokens": 10,
        "output_tokens_details": {"reasoning_tokens": 6},
        "total_tokens": 30,
    }


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "response.reasoning_text"),
        ({"reasoning": {"summary": "auto"}}, "response.reasoning_summary_text"),
    ],
)
async def test_reasoning_is_shown_raw_or_as_the_summary_that_was_asked_for(
    sdk: AsyncOpenAI, upstream: ScriptedUpstream, options: dict[str, Any], kind: str
) -> None:
    upstream.then(EVERYTHING)
    events = await read(sdk, **options)
    assert joined(events, f"{kind}.delta") == EVERYTHING.reasoning == joined(events, f"{kind}.done", "text")
    item = final(events).output[0]
    assert item.type == "reasoning"
    shown = [part.text for part in (item.summary if options else item.content or [])]
    assert shown == [EVERYTHING.reasoning]


async def test_a_refusal_is_streamed_as_one(sdk: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    upstream.then(Answer([Refusal("I'm "), Refusal("sorry")]))
    events = await read(sdk)
    assert joined(events, "response.refusal.delta") == joined(events, "response.refusal.done", "refusal") == "I'm sorry"
    assert not joined(events, "response.output_text.delta")


async def test_a_refusal_after_text_is_a_second_part_of_the_message(
    sdk: AsyncOpenAI, upstream: ScriptedUpstream
) -> None:
    upstream.then(Answer([Text("Well. "), Refusal("No.")]))
    [message] = final(await read(sdk)).output
    assert message.type == "message"
    assert [part.type for part in message.content] == ["output_text", "refusal"]


async def test_sound_and_its_transcript(sdk: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    upstream.then(Answer([Audio(b"\x01\x02", "Hi")]))
    events = await read(sdk)
    found = [(event.type, getattr(event, "delta", "")) for event in events if "audio" in event.type]
    assert found == [
        ("response.audio.transcript.delta", "Hi"),
        ("response.audio.delta", "AQI="),
        ("response.audio.transcript.done", ""),
        ("response.audio.done", ""),
    ]


@pytest.mark.parametrize(("finish", "reason"), [("length", "max_output_tokens"), ("content_filter", "content_filter")])
async def test_an_answer_that_was_cut_short_is_incomplete(
    sdk: AsyncOpenAI, upstream: ScriptedUpstream, finish: str, reason: str
) -> None:
    upstream.then(Answer([Text("Half an ans")], finish))
    events = await read(sdk)
    assert events[-1].type == "response.incomplete"
    assert final(events).incomplete_details is not None
    assert (final(events).status, final(events).incomplete_details.reason) == ("incomplete", reason)  # type: ignore[union-attr]
    assert final(events).output_text == "Half an ans"


async def test_an_error_inside_a_200_is_told_nested_and_then_as_failed(
    sdk: AsyncOpenAI, upstream: ScriptedUpstream
) -> None:
    upstream.then(Answer([Text("Hi"), Fault("insufficient_quota", "You exceeded your quota"), Text("never")]))
    with pytest.raises(openai.APIError, match="You exceeded your quota"):
        await read(sdk)
    upstream.then([*script.opening(), *script.error("server_error", "overloaded")[1:]])
    events = await read(sdk)
    assert events[-1].type == "response.failed"
    error = final(events).error
    assert error is not None
    assert (error.code, error.message) == ("server_error", "overloaded")


async def test_a_flat_error_is_an_event_like_any_other(sdk: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    upstream.then([*script.opening(), script.flat_error("server_error", "overloaded")])
    *_, last = await read(sdk)
    assert last.type == "error"
    assert (last.code, last.message) == ("server_error", "overloaded")


@pytest.mark.parametrize(("status", "error"), [(429, openai.RateLimitError), (400, openai.BadRequestError)])
async def test_a_refused_request_has_the_vendors_class_and_words(
    sdk: AsyncOpenAI, upstream: ScriptedUpstream, status: int, error: type[openai.APIStatusError]
) -> None:
    upstream.then(script.refusal("limited", "slow down", status))
    with pytest.raises(error, match="slow down") as caught:
        await read(sdk)
    assert caught.value.code == "limited"


@pytest.mark.parametrize("cutting", [script.byte_by_byte, lambda steps: [script.at_once(steps)]])
async def test_how_it_is_cut_into_writes_changes_nothing(
    sdk: AsyncOpenAI, upstream: ScriptedUpstream, cutting: Callable[..., Any]
) -> None:
    steps = script.text("Grüße, ", "世界", " 🦞")
    upstream.then(steps, [*cutting(steps)])
    assert joined(await read(sdk), "response.output_text.delta") == "Grüße, 世界 🦞"
    assert joined(await read(sdk), "response.output_text.delta") == "Grüße, 世界 🦞"


async def test_a_scripted_event_may_lack_its_number_and_its_place(sdk: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    bare = script.event("response.output_text.delta", delta="Hi", sequence_number=None)
    upstream.then([*script.opening(), bare, script.completed()])
    created, _, delta, completed = await read(sdk)
    assert (created.sequence_number, completed.sequence_number) == (0, 3)
    assert delta.type == "response.output_text.delta"
    assert delta.model_fields_set == {"type", "delta"}


async def test_without_stream_the_answer_is_one_object(sdk: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    upstream.then(EVERYTHING)
    response = await sdk.responses.create(model="some-model", input="Hi")
    assert (response.output_text, response.model, response.status) == (EVERYTHING.text, "some-model", "completed")
    assert await sdk.responses.retrieve(response.id) == response
    unstored = await sdk.responses.create(model="sim", input="Hi", store=False)
    with pytest.raises(openai.NotFoundError, match=unstored.id):
        await sdk.responses.retrieve(unstored.id)


async def test_a_background_response_goes_on_alone_and_is_read_on_from_a_number(
    sdk: AsyncOpenAI, upstream: ScriptedUpstream
) -> None:
    gate = asyncio.Event()
    upstream.then(Answer([Text("Hello"), gate, Text(", "), Text("world")]))
    stream = await sdk.responses.create(model="sim", input="Hi", stream=True, background=True)
    first = []
    async for event in stream:
        first.append(event)
        if event.type == "response.output_text.delta":
            break
    await stream.close()
    await asyncio.wait_for(upstream.requests[0].ended.wait(), 5)
    assert upstream.requests[0].was_cut
    assert [event.type for event in first[:3]] == ["response.created", "response.queued", "response.in_progress"]
    response_id = first[0].response.id  # type: ignore[union-attr]
    assert (await sdk.responses.retrieve(response_id)).status == "in_progress"
    seen = first[-1].sequence_number
    more = await sdk.responses.retrieve(response_id, stream=True, starting_after=seen)
    gate.set()
    rest = [event async for event in more]
    assert rest[0].sequence_number == seen + 1
    assert joined([*first, *rest], "response.output_text.delta") == "Hello, world"
    assert (await sdk.responses.retrieve(response_id)).output_text == "Hello, world"
    whole = [event async for event in await sdk.responses.retrieve(response_id, stream=True)]
    assert whole == [*first, *rest]
    assert [(request.method, request.path) for request in upstream.requests[:2]] == [
        ("POST", "/v1/responses"),
        ("GET", f"/v1/responses/{response_id}"),
    ]
    assert upstream.requests[2].query == {"stream": "true", "starting_after": str(seen)}


async def test_a_cut_breaks_a_background_stream_once_and_not_its_response(
    sdk: AsyncOpenAI, upstream: ScriptedUpstream
) -> None:
    upstream.then(Answer([Text("Hello"), script.Cut(), Text(", world")]))
    stream = await sdk.responses.create(model="sim", input="Hi", stream=True, background=True)
    events = []
    with pytest.raises(openai.APIConnectionError):
        async for event in stream:
            events.append(event)
    seen = events[-1].sequence_number
    more = await sdk.responses.retrieve("resp_1", stream=True, starting_after=seen)
    events += [event async for event in more]
    assert joined(events, "response.output_text.delta") == "Hello, world"
    assert [event.sequence_number for event in events] == [*range(len(events))]


async def test_a_background_response_is_cancelled_and_its_stream_just_ends(
    sdk: AsyncOpenAI, upstream: ScriptedUpstream
) -> None:
    upstream.then(Answer([Text("Once upon"), asyncio.Event()]))
    stream = await sdk.responses.create(model="sim", input="Hi", stream=True, background=True)
    events = aiter(stream)
    while (await anext(events)).type != "response.output_text.delta":
        pass
    cancelled = await sdk.responses.cancel("resp_1")
    assert cancelled.status == "cancelled"
    assert [event async for event in events] == []
    assert await sdk.responses.cancel("resp_1") == cancelled == await sdk.responses.retrieve("resp_1")


async def test_a_background_response_may_be_polled(sdk: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    gate = asyncio.Event()
    upstream.then(Answer([gate, Text("Hi")]))
    response = await sdk.responses.create(model="sim", input="Hi", background=True)
    assert (response.status, response.background) == ("queued", True)
    gate.set()
    while response.status in ("queued", "in_progress"):
        response = await sdk.responses.retrieve(response.id)
    assert response.output_text == "Hi"
    with pytest.raises(openai.NotFoundError):
        await sdk.responses.retrieve(response.id, stream=True)


async def test_only_background_responses_are_streamed_again_or_cancelled(
    sdk: AsyncOpenAI, upstream: ScriptedUpstream
) -> None:
    await read(sdk)
    with pytest.raises(openai.NotFoundError, match="resp_1"):
        await sdk.responses.retrieve("resp_1", stream=True)
    with pytest.raises(openai.BadRequestError, match="synchronous"):
        await sdk.responses.cancel("resp_1")
    for call in (sdk.responses.retrieve, sdk.responses.cancel):
        with pytest.raises(openai.NotFoundError, match="resp_9"):
            await call("resp_9")
    upstream.then_refuse_retrieving(script.refusal("server_error", "later", 500))
    with pytest.raises(openai.InternalServerError, match="later"):
        await sdk.responses.retrieve("resp_1")


async def test_dashscope_streams_the_same_answer_in_its_own_way(
    compatible: AsyncOpenAI, upstream: ScriptedUpstream
) -> None:
    upstream.then(EVERYTHING)
    events = await read(compatible, background=True)
    assert (final(events).output_text, final(events).background) == (EVERYTHING.text, False)
    assert joined(events, "response.reasoning_text.delta") == EVERYTHING.reasoning
    assert [e.model_fields_set & {"content_index"} for e in events if "reasoning_text" in e.type] == [set()] * 3
    calls = [event.item for event in events if event.type == "response.output_item.done"]
    arguments = [json.loads(item.arguments or "{}") for item in calls if item.type == "function_call"]
    assert arguments == [{"city": "Oslo"}, {}]
    assert not [event for event in events if "arguments" in event.type]
    created = events[0]
    assert created.type == "response.created"
    assert (created.response.model, created.response.status, final(events).model) == ("", "queued", "sim")
    assert final(events).usage.x_details[0]["prompt_tokens_details"]["cache_creation_input_tokens"] == 3  # type: ignore[union-attr]


async def test_dashscope_fails_in_one_event_and_has_no_way_back(
    compatible: AsyncOpenAI, upstream: ScriptedUpstream
) -> None:
    upstream.then(Answer([Fault("ModelNotFound", "no such model", 404)]))
    events = await read(compatible)
    assert [event.type for event in events] == ["response.created", "response.in_progress", "response.failed"]
    assert final(events).error is not None
    with pytest.raises(openai.NotFoundError, match="Not support"):
        await compatible.responses.retrieve("resp_1", stream=True)
    with pytest.raises(openai.NotFoundError, match="Not support"):
        await compatible.responses.cancel("resp_1")
    assert (await compatible.responses.retrieve("resp_1")).status == "failed"


async def test_a_comment_after_an_event_with_an_id_breaks_the_sdk(
    compatible: AsyncOpenAI, upstream: ScriptedUpstream
) -> None:
    """Why we decode the bytes ourselves."""
    upstream.then([*script.opening(), script.COMMENT, script.completed()])
    with pytest.raises(json.JSONDecodeError):
        await read(compatible)
