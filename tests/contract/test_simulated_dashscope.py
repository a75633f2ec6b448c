"""The vendor's own SDK reads our simulated native API as it reads the real one."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from http import HTTPStatus
from typing import Any

import dashscope
import pytest
from dashscope import Generation, MultiModalConversation
from dashscope.api_entities.dashscope_response import DashScopeAPIResponse

from deltafan.testing import (
    Answer,
    Audio,
    Cut,
    Fault,
    Reasoning,
    ScriptedUpstream,
    Text,
    Tokens,
    ToolCall,
    scripted_upstream,
)
from deltafan.testing import dashscope as script

# Their types are those of both answers at once, streamed or not.
GENERATE: Callable[..., Any] = Generation.call
CONVERSE: Callable[..., Any] = MultiModalConversation.call

HI = [{"role": "user", "content": "Say hi"}]
HI_LIST = [{"role": "user", "content": [{"text": "Say hi"}]}]
ANSWER = Answer(
    [
        Reasoning("Hm. "),
        Reasoning("Weather."),
        Text("Let me "),
        Text("see 世界."),
        ToolCall("call_1", "weather", ['{"city":', ' "Oslo"}']),
        ToolCall("call_2", "time", ["{}"]),
    ],
    "tool_calls",
    Tokens(20, 10, cached_input=4, cache_write=3, reasoning=6),
)


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with scripted_upstream() as upstream:
        yield upstream


@pytest.fixture(autouse=True)
def _sdk(upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dashscope, "base_http_api_url", upstream.dashscope_url)
    monkeypatch.setattr(dashscope, "api_key", "key")
    yield
    dashscope.close_shared_sync_session()


async def read(model: str = "sim", **options: Any) -> list[DashScopeAPIResponse]:
    """The text path, streamed; the SDK blocks, so a thread waits for it."""
    settings = {"stream": True, "result_format": "message", "incremental_output": True, **options}
    return await asyncio.to_thread(lambda: list(GENERATE(model, messages=HI, **settings)))


async def read_multimodal(model: str = "sim", **options: Any) -> list[DashScopeAPIResponse]:
    settings = {"stream": True, "incremental_output": True, **options}
    return await asyncio.to_thread(lambda: list(CONVERSE(model, messages=HI_LIST, **settings)))


def messages(frames: list[DashScopeAPIResponse]) -> list[dict[str, Any]]:
    return [choice["message"] for frame in frames for choice in frame.output.choices or []]


def finishes(frames: list[DashScopeAPIResponse]) -> list[str]:
    return [choice["finish_reason"] for frame in frames for choice in frame.output.choices]


def thoughts(frames: list[DashScopeAPIResponse]) -> str:
    return "".join(message.get("reasoning_content", "") for message in messages(frames))


def joined(frames: list[DashScopeAPIResponse]) -> str:
    """The text, whether content is a string or a list."""
    contents = [message["content"] for message in messages(frames)]
    return "".join(c if isinstance(c, str) else "".join(part["text"] for part in c) for c in contents)


def calls(frames: list[DashScopeAPIResponse]) -> dict[int, tuple[str, str, str]]:
    found: dict[int, tuple[str, str, str]] = {}
    for message in messages(frames):
        for call in message.get("tool_calls") or []:
            call_id, name, arguments = found.get(call["index"], ("", "", ""))
            function = call["function"]
            found[call["index"]] = (
                call_id or call["id"],
                name or function.get("name", ""),
                arguments + function["arguments"],
            )
    return found


CALLS = {0: ("call_1", "weather", '{"city": "Oslo"}'), 1: ("call_2", "time", "{}")}


async def test_a_text_is_streamed_with_growing_usage(upstream: ScriptedUpstream) -> None:
    frames = await read()
    assert {frame.status_code for frame in frames} == {HTTPStatus.OK}
    assert joined(frames) == "Hello, world!"
    assert finishes(frames) == ["null"] * 4 + ["stop"]
    assert [frame.usage.output_tokens for frame in frames] == [1, 2, 3, 4, 5]
    assert dict(frames[-1].usage) == {
        "input_tokens": 7,
        "output_tokens": 5,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    [request] = upstream.requests
    assert request.path == "/api/v1/services/aigc/text-generation/generation"
    assert request.headers["X-DashScope-SSE"] == "enable"


async def test_the_result_format_text_has_no_choices() -> None:
    frames = await read(result_format="text")
    assert [frame.output.text for frame in frames] == ["Hello", ", ", "world", "!", ""]
    assert [frame.output.finish_reason for frame in frames] == ["null"] * 4 + ["stop"]


async def test_thinking_text_and_tools_on_the_text_path(upstream: ScriptedUpstream) -> None:
    upstream.then(ANSWER)
    frames = await read(enable_thinking=True)
    assert (thoughts(frames), joined(frames), calls(frames)) == (ANSWER.reasoning, ANSWER.text, CALLS)
    # The last fragment and the finish come together.
    assert finishes(frames) == ["null"] * (len(frames) - 1) + ["tool_calls"]
    assert frames[-1].output.choices[0].message.tool_calls
    usage = frames[-1].usage
    assert (usage.output_tokens, usage.output_tokens_details) == (10, {"reasoning_tokens": 6})
    assert usage.prompt_tokens_details["cache_creation_input_tokens"] == 3


async def test_thinking_text_and_tools_on_the_multimodal_path(upstream: ScriptedUpstream) -> None:
    upstream.then(ANSWER)
    frames = await read_multimodal(enable_thinking=True)
    assert (thoughts(frames), joined(frames), calls(frames)) == (ANSWER.reasoning, ANSWER.text, CALLS)
    assert [message["content"] for message in messages(frames)[1:4]] == [
        [],
        [{"text": "Let me "}],
        [{"text": "see 世界."}],
    ]
    assert finishes(frames) == ["null"] * (len(frames) - 1) + ["tool_calls"]


async def test_the_last_multimodal_frame_has_text_and_finish() -> None:
    frames = await read_multimodal()
    assert [message["content"] for message in messages(frames)][-1] == [{"text": "!"}]
    assert finishes(frames) == ["null"] * 3 + ["stop"]


# The SDK sends incremental_output true for every other model, and merges itself.
@pytest.mark.parametrize(("model", "is_cumulative"), [("sim-omni", True), ("sim", False)])
async def test_snapshots_and_increments_come_to_the_same(
    upstream: ScriptedUpstream, model: str, *, is_cumulative: bool
) -> None:
    upstream.then(ANSWER)
    frames = await read_multimodal(model, incremental_output=False)
    last = messages(frames)[-1]
    assert (last["reasoning_content"], last["content"]) == (ANSWER.reasoning, [{"text": ANSWER.text}])
    found = [(call["id"], call["function"]["name"], call["function"]["arguments"]) for call in last["tool_calls"]]
    assert found == [*CALLS.values()]
    assert upstream.requests[0].body["parameters"]["incremental_output"] is not is_cumulative


async def test_a_snapshot_on_the_text_path_holds_all_text_so_far(upstream: ScriptedUpstream) -> None:
    frames = await read(incremental_output=None, result_format=None)
    assert upstream.requests[0].body["parameters"] == {}
    texts = [frame.output.text for frame in frames]
    assert texts == ["Hello", "Hello, ", "Hello, world", "Hello, world!", "Hello, world!"]


async def test_sound_comes_in_pieces_and_then_as_an_address(upstream: ScriptedUpstream) -> None:
    upstream.then(Answer([Audio(b"\x01\x02", "Hi"), Audio(b"\x03")]))
    frames = await read_multimodal()
    assert [frame.output.audio["data"] for frame in frames[1:]] == ["AQI=", "Aw==", ""]
    assert frames[-1].output.audio["url"]
    assert joined(frames[:1]) == "Hi"
    assert frames[-1].output.finish_reason == "stop"


async def test_an_error_inside_a_200_ends_the_answer(upstream: ScriptedUpstream) -> None:
    upstream.then(Answer([Text("Hi"), Fault("Throttling.RateQuota", "slow down", 429), Text("never")]))
    first, last = await read()
    assert joined([first]) == "Hi"
    assert (last.code, last.message, last.output) == ("Throttling.RateQuota", "slow down", None)
    # The server says 429 in a comment; this SDK looks for a line that nobody sends.
    assert last.status_code == HTTPStatus.BAD_REQUEST


async def test_a_refused_request_has_its_status_code_and_words(upstream: ScriptedUpstream) -> None:
    upstream.then(script.refusal("InvalidApiKey", "Invalid API-key provided.", 401))
    [refused] = await read()
    assert (refused.status_code, refused.code) == (HTTPStatus.UNAUTHORIZED, "InvalidApiKey")
    assert refused.message == "Invalid API-key provided."


@pytest.mark.parametrize("status", [400, 200])
@pytest.mark.parametrize(("call", "model"), [(read, "qwen-vl-max"), (read_multimodal, "qwen-plus")])
async def test_a_model_on_the_other_path_is_refused_in_either_form(
    upstream: ScriptedUpstream, call: Callable[..., Any], model: str, status: int
) -> None:
    upstream.wrong_path_status = status
    [refused] = await call(model)
    assert (refused.status_code, refused.code) == (HTTPStatus.BAD_REQUEST, "InvalidParameter")
    assert refused.message == "url error, please check url!"


async def test_thinking_can_not_be_cumulative(upstream: ScriptedUpstream) -> None:
    [refused] = await read_multimodal("sim-omni", incremental_output=False, enable_thinking=True)
    assert refused.code == "InvalidParameter"
    assert "incremental_output" in refused.message


@pytest.mark.parametrize("cutting", [script.byte_by_byte, lambda steps: [script.at_once(steps)]])
async def test_how_it_is_cut_into_writes_changes_nothing(
    upstream: ScriptedUpstream, cutting: Callable[..., Any]
) -> None:
    steps = script.text("Grüße, ", "世界", " 🦞")
    upstream.then(steps, [*cutting(steps)])
    assert joined(await read()) == joined(await read()) == "Grüße, 世界 🦞"


async def test_hand_made_frames_and_a_comment(upstream: ScriptedUpstream) -> None:
    upstream.then([script.delta("Hi", reasoning_content="Hm."), script.COMMENT, script.delta("", finish="length")])
    frames = await read()
    assert (thoughts(frames), joined(frames), finishes(frames)) == ("Hm.", "Hi", ["null", "length"])


async def test_a_broken_connection_is_no_end(upstream: ScriptedUpstream) -> None:
    upstream.then([script.delta("Hi"), Cut()])
    with pytest.raises(Exception, match="ended prematurely"):
        await read()


async def test_without_the_header_the_answer_is_one_object(upstream: ScriptedUpstream) -> None:
    upstream.then(ANSWER, Answer([Fault("InternalError", "broken", 500)]))
    whole = await asyncio.to_thread(lambda: GENERATE("sim", messages=HI, result_format="message"))
    message = whole.output.choices[0].message
    assert (message.reasoning_content, message.content) == (ANSWER.reasoning, ANSWER.text)
    assert len(message.tool_calls) == 2
    failed = await asyncio.to_thread(lambda: GENERATE("sim", messages=HI))
    assert (failed.status_code, failed.code) == (500, "InternalError")
