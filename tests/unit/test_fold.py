"""What a generation is made into: the next turn's messages, a WAV file, a record and back."""

import io
import wave
from typing import Any

import pytest

from deltafan import Generation, InvalidRequest, ToolCall, UsageRecord
from deltafan._messages import next_turn

CALLS = (ToolCall("call_1", "f", '{"a":1}'),)


def generation(**fields: Any) -> Generation:
    return Generation(**{"status": "completed", "api": "chat", "model": "m", "provider": "p", **fields})


def test_a_record_holds_everything() -> None:
    call = ToolCall("a", "f", "{}", {"extra_content": {"x": 1}})
    whole = generation(pcm=b"\x00\x01", transcript="t", annotations=({"url": "u"},), tool_calls=(call,), content="c")
    assert Generation.from_json(whole.to_json()) == whole


def test_speech_is_playable() -> None:
    samples = bytes(range(48))
    with wave.open(io.BytesIO(generation(pcm=samples + b"\x00").audio or b"")) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (24_000, 1, 2)
        assert file.readframes(100) == samples, "without the odd byte of a cut stream"
    assert generation(pcm=b"RIFFxx").audio == b"RIFFxx"
    assert generation().audio is None


@pytest.mark.parametrize(
    ("model", "calls", "goes_back"),
    [
        ("qwen-plus", (), False),
        ("qwen-plus", CALLS, False),
        ("qwen3.8-max", (), True),
        ("kimi-k2.7", CALLS, True),
        ("kimi-k2-thinking", CALLS, True),
        ("deepseek-reasoner", (), False),
        ("deepseek-reasoner", CALLS, True),
    ],
)
def test_reasoning_goes_back_to_the_models_that_want_it(model: str, calls: Any, goes_back: bool) -> None:
    (message,) = generation(model=model, reasoning="Hm.", tool_calls=calls).to_messages()
    assert ("reasoning_content" in message) is goes_back
    (forced,) = generation(model=model, reasoning="Hm.").to_messages(reasoning=True)
    assert forced["reasoning_content"] == "Hm."


def test_deepseek_gets_even_an_empty_reasoning_back_with_tools() -> None:
    (message,) = generation(model="deepseek-chat", tool_calls=CALLS).to_messages()
    assert message["reasoning_content"] == ""


def test_what_a_provider_wants_back_goes_back() -> None:
    call = ToolCall("a", "f", "{}", {"extra_content": {"google": {"thought_signature": "s"}}})
    (message,) = generation(tool_calls=(call,)).to_messages()
    assert message["tool_calls"][0]["extra_content"] == {"google": {"thought_signature": "s"}}


ASKED = {
    "chat": {"messages": [{"role": "user", "content": "Hi"}], "tool_choice": "required", "seed": 1},
    "responses": {"input": "Hi", "tool_choice": {"type": "function", "name": "f"}, "seed": 1},
    "dashscope": {
        "input": {"messages": [{"role": "user", "content": "Hi"}]},
        "parameters": {"tool_choice": {"x": 1}, "seed": 1},
    },
}
ANSWERED = {
    "chat": {
        "messages": [
            {"role": "user", "content": "Hi"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": "42"},
        ],
        "seed": 1,
    },
    "responses": {
        "input": [
            {"role": "user", "content": "Hi"},
            {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": '{"a":1}'},
            {"type": "function_call_output", "call_id": "call_1", "output": "42"},
        ],
        "seed": 1,
    },
    "dashscope": {
        "input": {
            "messages": [
                {"role": "user", "content": "Hi"},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {
                            "index": 0,
                            "id": "call_1",
                            "type": "function",
                            "function": {"name": "f", "arguments": '{"a":1}'},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "call_1", "content": "42"},
            ]
        },
        "parameters": {"seed": 1},
    },
}


@pytest.mark.parametrize("api", ASKED)
def test_the_next_turn_in_each_apis_form(api: str) -> None:
    asking = generation(api=api, tool_calls=CALLS)
    assert next_turn(api, ASKED[api], asking, {"call_1": 42}, {}) == ANSWERED[api]


def test_an_answer_to_nothing_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="failed without calling a tool"):
        next_turn("chat", ASKED["chat"], generation(status="failed"), {}, {})


@pytest.mark.parametrize(
    ("model", "options", "goes_back"),
    [
        ("qwen-plus", {"preserve_thinking": True}, True),
        ("qwen3.8-max", {"preserve_thinking": False}, False),
        ("glm-5", {"clear_thinking": False}, True),
        ("glm-5", {"clear_thinking": True}, False),
        ("glm-5", {}, False),
    ],
)
@pytest.mark.parametrize("api", ASKED)
def test_the_request_decides_whether_reasoning_goes_back(
    api: str, model: str, options: dict[str, Any], goes_back: bool
) -> None:
    body = {**ASKED[api], **({"parameters": options} if api == "dashscope" else options)}
    turn = next_turn(api, body, generation(api=api, model=model, reasoning="Hm.", tool_calls=CALLS), {"call_1": ""}, {})
    assert ("Hm." in str(turn)) is goes_back


TWO_CALLS = (*CALLS, ToolCall("call_2", "g", "{}"))
OUTPUTS = [{"type": "function_call_output", "call_id": id_, "output": "42"} for id_ in ("call_1", "call_2")]


def next_response(body: dict[str, Any], **fields: Any) -> dict[str, Any]:
    asking = generation(**{"api": "responses", "tool_calls": TWO_CALLS, **fields})
    return next_turn("responses", body, asking, {"call_2": "42", "call_1": "42"}, {})


def test_each_output_stands_right_behind_its_call() -> None:
    asked, one, its_output, two, its_other = next_response({"input": "Hi"})["input"]
    assert asked == {"role": "user", "content": "Hi"}
    assert [one["call_id"], two["call_id"]] == ["call_1", "call_2"]
    assert [its_output, its_other] == OUTPUTS


@pytest.mark.parametrize("provider", ["deepseek", "p"])
def test_reasoning_is_an_item_for_those_that_want_it_with_tools(provider: str) -> None:
    first = next_response({"input": "Hi"}, provider=provider, reasoning="Hm.", content="So.")["input"][1]
    thought = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}
    assert (first == thought) is (provider == "deepseek")
    (forced, _) = generation(api="responses", reasoning="Hm.", content="So.").to_messages(reasoning=True)
    assert forced == thought
    assert len(generation(api="responses", reasoning="Hm.", content="So.").to_messages()) == 1


def test_encrypted_reasoning_goes_back_before_its_call() -> None:
    item = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAA"}
    call = ToolCall("call_2", "g", "{}", {"reasoning": [item]})
    items = next_response({"input": "Hi"}, tool_calls=(*CALLS, call))["input"]
    assert [one.get("type") for one in items] == [
        None,
        "function_call",
        "function_call_output",
        "reasoning",
        "function_call",
        "function_call_output",
    ]
    assert items[3] == item


def billed(response_id: str | None) -> UsageRecord:
    names: Any = {"job_id": "j", "call_id": "c", "provider": "p", "model": "m", "api": "responses"}
    how: Any = {"attempt": 1, "attempt_no": 1, "outcome": "completed", "source": "provider"}
    return UsageRecord(**names, **how, response_id=response_id)


@pytest.mark.parametrize(
    ("body", "response_id", "changed"),
    [
        ({"conversation": "conv_1"}, None, {}),
        ({"conversation": {"id": "conv_1"}, "instructions": "Be brief."}, "resp_2", {}),
        ({"previous_response_id": "resp_1"}, "resp_2", {"previous_response_id": "resp_2"}),
    ],
)
def test_a_conversation_that_the_provider_keeps_is_not_sent_again(
    body: dict[str, Any], response_id: str | None, changed: dict[str, Any]
) -> None:
    turn = next_response({"input": "Hi", **body}, usage=billed(response_id))
    assert turn == {**body, **changed, "input": OUTPUTS}


def test_nothing_is_left_to_a_provider_unasked() -> None:
    """The next turn may go to another one."""
    turn = next_response({"input": "Hi"}, usage=billed("resp_2"))
    assert ("previous_response_id" in turn, len(turn["input"])) == (False, 5)


@pytest.mark.parametrize(("body", "response_id"), [({}, None), ({"store": False}, "resp_2")])
def test_a_response_that_can_not_be_found_again_is_sent_again(body: dict[str, Any], response_id: str | None) -> None:
    asked = {"input": "Hi", "previous_response_id": "resp_1", **body}
    turn = next_response(asked, usage=billed(response_id))
    assert (turn["previous_response_id"], len(turn["input"])) == ("resp_1", 5)
