"""What an answer looks like on the wire, beside recordings; what it means is tests/contract/test_simulated_*."""

import asyncio
from typing import Any

import orjson
import pytest

from deltafan.testing import (
    Answer,
    Audio,
    Fault,
    Frame,
    Gap,
    Named,
    Raw,
    Reasoning,
    Step,
    Text,
    Tokens,
    ToolCall,
    chat,
    dashscope,
    responses,
)

CALL = ToolCall("call_1", "weather", ['{"location": "San Francisco', '"}'])


def choices(steps: list[Step]) -> list[dict[str, Any]]:
    return [step["choices"][0] for step in steps if isinstance(step, dict) and step["choices"]]


def deltas(steps: list[Step]) -> list[dict[str, Any]]:
    return [choice["delta"] for choice in choices(steps)]


def types(steps: list[Step]) -> list[str]:
    return [step["type"].removeprefix("response.") for step in steps if isinstance(step, dict)]


def test_a_single_call_in_openais_chat_begins_with_its_role() -> None:
    opener, *fragments, last = deltas(chat.render(Answer([CALL], "tool_calls")))
    function = {"name": "weather", "arguments": ""}
    assert opener == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": function}],
    }
    assert fragments == [
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"location": "San Francisco'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"}'}}]},
    ]
    assert last == {}


def test_parallel_calls_in_openais_chat_come_after_a_role_of_their_own() -> None:
    first, *rest = deltas(chat.render(Answer([CALL, CALL], "tool_calls")))
    assert first == {"role": "assistant", "content": None}
    assert [delta["tool_calls"][0]["index"] for delta in rest[:-1]] == [0, 0, 0, 1, 1, 1]


def test_a_call_in_dashscopes_chat_is_the_recorded_one() -> None:
    found = choices(chat.render(Answer([CALL], "tool_calls"), dialect="dashscope"))
    assert found[0]["delta"] == {
        "content": None,
        "tool_calls": [
            {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}}
        ],
        "role": "assistant",
    }
    assert found[2]["delta"] == {
        "content": None,
        "tool_calls": [{"index": 0, "id": "", "type": "function", "function": {"arguments": '"}'}}],
    }
    # The fourth has an empty fragment and neither finish_reason nor logprobs.
    empty = {"index": 0, "id": "", "type": "function", "function": {"arguments": ""}}
    assert found[3] == {"delta": {"tool_calls": [empty]}, "index": 0}
    assert found[4] == {"finish_reason": "tool_calls", "delta": {}, "index": 0, "logprobs": None}


def test_thinking_in_dashscopes_chat_has_a_null_for_what_is_silent() -> None:
    assert deltas(chat.render(Answer([Reasoning("We"), Text("Hi")]), dialect="dashscope")) == [
        {"content": None, "role": "assistant", "reasoning_content": ""},
        {"content": None, "reasoning_content": "We"},
        {"content": "Hi", "reasoning_content": None},
        {"content": "", "reasoning_content": None},
    ]


def test_sound_in_dashscopes_chat_has_its_transcript_as_content() -> None:
    _, said, sound, _ = deltas(chat.render(Answer([Audio(b"\x01", "Hi")]), dialect="dashscope"))
    assert said == {"content": "Hi"}
    assert sound == {"audio": {"data": "AQ==", "expires_at": 1, "id": "audio_1"}}


def test_only_openais_chat_obfuscates_and_only_if_it_may() -> None:
    def obfuscated(**options: Any) -> int:
        steps = chat.render(Answer([Text("Hi")]), **options)
        return sum("obfuscation" in step for step in steps if isinstance(step, dict))

    assert (obfuscated(), obfuscated(include_obfuscation=False), obfuscated(dialect="dashscope")) == (4, 0, 0)


@pytest.mark.parametrize("render", [chat.render, responses.render, dashscope.render])
def test_steps_between_the_parts_stay_where_they_are_and_a_fault_is_the_end(render: Any) -> None:
    between: list[Step] = [Gap(1), asyncio.Event(), Raw(b"raw"), Named("ping", {})]
    steps = render(Answer([Text("one"), *between, Text("two"), Fault("code", "message"), Text("never")]))
    begin = steps.index(between[0])
    assert steps[begin : begin + 4] == between
    written = [step for step in steps if isinstance(step, dict | Named)]
    assert "never" not in str(written)
    assert "message" in str(written[-1])
    assert chat.DONE not in steps


def test_dashscopes_responses_frame_is_the_documented_one() -> None:
    framing = responses.Framing("resp_7", "m", "dashscope")
    assert framing(responses.delta("output_text", "Hi", content_index=None)) == (
        b"id:1\nevent:response.output_text.delta\n:HTTP_STATUS/200\n"
        b'data:{"sequence_number":0,"type":"response.output_text.delta","item_id":"msg_1","output_index":0,'
        b'"content_index":null,"delta":"Hi"}\n\n'
    )


def test_openais_responses_frame_names_its_event() -> None:
    assert responses.frame(responses.event("response.x", delta="Hi"), 3) == (
        b'event: response.x\ndata: {"sequence_number":3,"type":"response.x","delta":"Hi"}\n\n'
    )


def test_a_response_object_is_completed_from_what_came_before() -> None:
    framing = responses.Framing("resp_7", "m")
    for step in (*responses.opening(), responses.failed("code", "message")):
        written = framing(step)
    response = orjson.loads(written.split(b"data: ")[1])["response"]
    assert (response["id"], response["model"], response["status"]) == ("resp_7", "m", "failed")
    assert response["error"] == {"code": "code", "message": "message"}
    assert framing.response == response


def test_numbers_follow_one_that_was_set_and_one_may_be_left_out() -> None:
    framing = responses.Framing()
    numbers = []
    for number in ({}, {"sequence_number": None}, {}, {"sequence_number": 7}, {}):
        data = orjson.loads(framing(responses.event("x", **number)).split(b"data: ")[1])
        numbers.append(data.get("sequence_number"))
    assert numbers == [0, None, 2, 7, 8]


def test_each_item_of_a_responses_answer_is_opened_and_closed_before_the_next() -> None:
    found = types(responses.render(Answer([Reasoning("a"), Text("b"), CALL])))
    assert found == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]


def test_an_incomplete_answers_last_item_is_incomplete() -> None:
    *_, item_done, end = responses.render(Answer([Text("Half")], "length"))
    assert isinstance(item_done, dict)
    assert isinstance(end, dict)
    assert item_done["item"]["status"] == end["response"]["status"] == "incomplete"


def test_a_native_frame_is_the_recorded_one() -> None:
    step = dashscope.text("1+", finish="stop")[0]
    assert isinstance(step, dict)
    written = dashscope.frame(step, 4)
    head, _, data = written.partition(b"data:")
    assert head == b"id:4\nevent:result\n:HTTP_STATUS/200\n"
    assert orjson.loads(data) == {
        "output": {"choices": [{"message": {"content": "1+", "role": "assistant"}, "finish_reason": "null"}]},
        "usage": {
            "input_tokens": 7,
            "output_tokens": 2,
            "total_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
        "request_id": "sim-1",
    }
    assert written.endswith(b"}\n\n")


def test_a_native_error_tells_its_status_in_a_comment() -> None:
    assert dashscope.frame(dashscope.error("InvalidParameter", "bad", 400)) == (
        b"id:1\nevent:error\n:HTTP_STATUS/400\n"
        b'data:{"code":"InvalidParameter","message":"bad","request_id":"sim-1"}\n\n'
    )


def test_a_native_call_ends_together_with_the_answer() -> None:
    *_, last = choices([step["output"] for step in dashscope.render(Answer([CALL], "tool_calls"))])  # type: ignore[index]
    assert last == {
        "message": {
            "content": "",
            "role": "assistant",
            "tool_calls": [{"index": 0, "id": "", "type": "function", "function": {"arguments": '"}'}}],
        },
        "finish_reason": "tool_calls",
        "index": 0,
    }


def test_native_snapshots_hold_whole_calls_without_an_index() -> None:
    steps = dashscope.render(Answer([CALL], "tool_calls"), incremental=False)
    found = [choice["message"]["tool_calls"] for choice in choices([step["output"] for step in steps])]  # type: ignore[index]
    arguments = [call["function"]["arguments"] for [call] in found]
    assert arguments == ["", '{"location": "San Francisco', '{"location": "San Francisco"}']
    assert "index" not in found[-1][0]


def test_native_usage_grows_up_to_what_the_answer_used() -> None:
    answer = Answer([Reasoning("a"), Text("b"), Text("c")], usage=Tokens(5, 10, reasoning=4))
    usages = [step["usage"] for step in dashscope.render(answer)]  # type: ignore[index]
    assert [usage["output_tokens"] for usage in usages] == [2, 5, 7, 10]
    assert [usage["output_tokens_details"]["reasoning_tokens"] for usage in usages] == [2, 4, 4, 4]


def test_an_answer_without_usage_tells_none() -> None:
    answer = Answer([Text("Hi")], usage=None)
    assert '"usage":{}' in dashscope.at_once(_frames(dashscope.render(answer))).data.decode()
    assert '"usage":null' in responses.at_once(_frames(responses.render(answer))[-1:]).data.decode()
    assert all(step["usage"] is None for step in chat.render(answer) if isinstance(step, dict))


def test_an_answer_without_parts_still_ends() -> None:
    empty = Answer([], "length")
    assert [choice["finish_reason"] for choice in choices(chat.render(empty))] == [None, "length"]
    assert types(responses.render(empty)) == ["created", "in_progress", "incomplete"]
    [only] = dashscope.render(empty, route="multimodal")
    assert isinstance(only, dict)
    assert only["output"]["choices"][0]["finish_reason"] == "length"


def _frames(steps: list[Step]) -> list[Frame]:
    return [step for step in steps if isinstance(step, dict | Raw | Named)]


@pytest.mark.parametrize(
    ("model", "route"),
    [
        ("qwen-plus", "text"),
        ("qwq-32b", "text"),
        ("qwen-vl-max", "multimodal"),
        ("qwen3-omni-flash", "multimodal"),
        ("qvq-max", "multimodal"),
        ("qwen3.6-plus", "multimodal"),
        ("sim", None),
        ("sim-3x0", None),
        ("sim-text", "text"),
        ("sim-multimodal", "multimodal"),
    ],
)
def test_a_models_name_says_where_it_lives(model: str, route: str | None) -> None:
    assert dashscope.lives_on(model) == route
