"""What a generation is made into: the next turn's messages, a WAV file, a record and back."""

import io
import wave
from typing import Any

import pytest

from deltafan import Generation, InvalidRequest, ToolCall
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
