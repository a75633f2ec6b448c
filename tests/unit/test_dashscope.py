"""Decoding of DashScope's native API. The numbered tests are the oddities of real servers that break naive parsers."""

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltafan_worker._dashscope import DashScopeDecoder
from support.decoding import Outcome, cut_at

USAGE = {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5}


def result(output: Any, *, number: int = 1, blank: bytes = b"\n", **fields: Any) -> bytes:
    data = orjson.dumps({"output": output, "usage": USAGE, "request_id": "r1", **fields})
    return b"id:%d\nevent:result\n:HTTP_STATUS/200\ndata:%b\n%b" % (number, data, blank)


def message(content: Any = "", finish: Any = "null", **fields: Any) -> bytes:
    body = {"role": "assistant", "content": content, **fields}
    return result({"choices": [{"message": body, "finish_reason": finish}]})


def tool(finish: str = "null", **fields: Any) -> bytes:
    return message(tool_calls=[fields], finish=finish)


def decode(*pieces: bytes, model: str = "qwen-plus") -> Outcome:
    return Outcome(DashScopeDecoder(model), *pieces)


STOP = message(finish="stop")


def test_an_ordinary_stream() -> None:
    outcome = decode(message("1+"), message("1"), message("等于"), message("2。", "stop"))
    assert [data.decode() for _, data in outcome.deltas] == ["1+", "1", "等于", "2。"]
    assert (outcome.finish, outcome.usage, outcome.decoder.response_id) == ("stop", USAGE, "r1")
    assert outcome.decoder.finished


def test_the_text_format() -> None:
    outcome = decode(
        *(result({"finish_reason": end, "text": t}) for t, end in (("1+", "null"), ("1", "null"), ("", "stop")))
    )
    assert (outcome.generation.content, outcome.finish) == ("1+1", "stop")


def test_thinking_and_content_in_parts() -> None:
    outcome = decode(
        message([], reasoning_content="Hm"), message([], reasoning_content="."), message([{"text": "a"}]), STOP
    )
    assert (outcome.generation.reasoning, outcome.generation.content) == ("Hm.", "a")


def test_tool_calls_whose_last_fragment_has_the_finish_reason() -> None:
    outcome = decode(
        tool(index=0, id="call_1", function={"name": "f", "arguments": '{"a":'}),
        tool(index=0, id="", function={"arguments": "1}"}),
        tool(index=1, id="call_2", function={"name": "g", "arguments": ""}),
        tool("tool_calls", index=1, id="", function={"arguments": "{}"}),
    )
    assert outcome.calls == [("call_1", "f", '{"a":1}'), ("call_2", "g", "{}")]
    assert outcome.finish == "tool_calls"


def test_search_results_are_sources_and_speech_is_audio() -> None:
    found = {"search_results": [{"index": 1, "title": "t", "url": "http://a"}]}
    outcome = decode(
        result({"choices": [{"message": {"content": ""}, "finish_reason": "null"}], "search_info": found}, usage={}),
        result({"choices": [{"message": {"content": "x"}, "finish_reason": "null"}], "search_info": found}),
        result({"audio": {"data": "AAAA", "expires_at": 1}, "finish_reason": "null"}),
        result({"audio": {"data": "", "url": "http://a"}, "finish_reason": "stop"}),
    )
    assert [kind for kind, _ in outcome.deltas] == ["annotation", "content", "audio"]
    assert outcome.generation.annotations[0]["url"] == "http://a"


def test_oddity_08_frames_without_blank_lines() -> None:
    frames = [result({"text": t, "finish_reason": "null"}, number=n, blank=b"") for n, t in enumerate("abc", 1)]
    assert decode(b"".join(frames), STOP).generation.content == "abc"
    for head in (b"id:4\nevent:error\n", b"id:4\n", b"event:error\n"):
        outcome = decode(b"".join([*frames, head, b":HTTP_STATUS/429\ndata:{}\n"]))
        assert (outcome.generation.content, outcome.code) == ("abc", "stream_error"), "a status is of one frame"


def test_deep_research_has_a_message_in_place_of_choices() -> None:
    alive = {"message": {"phase": "KeepAlive", "content": ""}, "fininshed": False, "fininshed_reason": "null"}
    said = {"message": {"phase": "answer", "content": "a"}, "fininshed": False, "fininshed_reason": "null"}
    end = {"message": {"phase": "answer", "content": ""}, "fininshed": True, "fininshed_reason": "stop"}
    outcome = decode(result(alive), result(said), result(alive), result(end))
    assert (outcome.generation.content, outcome.finish) == ("a", "stop")
    assert outcome.decoder.frames == 2, "news of life alone breaks no silence"


def test_oddity_16_the_word_null_is_no_finish_reason() -> None:
    assert decode(message("a"), message("b", finish=None), message("c", finish="")).code == "truncated"


def test_oddity_18_the_last_usage_that_is_not_empty_counts() -> None:
    frames = [result({"text": t, "finish_reason": "null"}, usage={"output_tokens": n}) for n, t in ((1, "a"), (9, "b"))]
    end = result({"text": "", "finish_reason": "stop"}, usage={})
    assert decode(*frames, end).usage == {"output_tokens": 9}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, ""),
        ("", ""),
        ([], ""),
        ("a", "a"),
        ([{"text": "a"}, {"image": "x"}, {"text": "b"}], "ab"),
        ({"text": "a"}, ""),
    ],
)
def test_oddity_24_content_in_all_its_forms(content: Any, text: str) -> None:
    assert decode(message(content), STOP).generation.content == text


def test_oddity_24_the_word_null_stands_for_nothing_beside_other_output() -> None:
    outcome = decode(message("null", reasoning_content="Hm."), message("null"), STOP)
    assert (outcome.generation.reasoning, outcome.generation.content) == ("Hm.", "null")


def test_oddity_24_json_in_a_string() -> None:
    texts = [
        '[{"text": "Okay',
        '[{"text": "Okay, \\u4e16',
        '[{"text": "Okay, \\u4e16\\n',
        '[{"text": "Okay, \\u4e16\\n."}]',
    ]
    frames = [result({"choices": [{"message": {"content": text}}]}) for text in texts]
    assert decode(*frames, STOP, model="kimi-k2").generation.content == "Okay, 世\n."
    assert decode(message(texts[-1]), STOP).generation.content == texts[-1], "any other model may write JSON"
    assert decode(message('[{"text": "a\\qb"}]'), STOP, model="kimi-k2").generation.content == "a\\qb"


def test_oddity_25_reasoning_and_content_in_one_frame() -> None:
    outcome = decode(message([{"text": "告别杭州"}], reasoning_content="最完美的周末。"), STOP)
    assert [kind for kind, _ in outcome.deltas] == ["reasoning", "content"]


THROTTLED = (
    b'id:1\nevent:error\n:HTTP_STATUS/429\ndata:{"code":"Throttling.RateQuota","message":"slow","request_id":"r"}\n\n'
)


@pytest.mark.parametrize(
    ("stream", "code", "retryable"),
    [
        (THROTTLED, "Throttling.RateQuota", True),
        (b'data:{"code":"InvalidParameter","message":"m","request_id":"r"}\n\n', "InvalidParameter", False),
        (b'data:{"error":{"code":"InternalError","message":"m"}}\n\n', "InternalError", True),
        (b'data:{"output":null,"message":"down","request_id":"r"}\n\n', "stream_error", True),
        (b':HTTP_STATUS/503\ndata:{"message":"m"}\n\n', "stream_error", True),
    ],
)
def test_oddity_27_errors_inside_a_200(stream: bytes, code: str, retryable: bool) -> None:
    outcome = decode(message("a"), stream)
    assert outcome.error is not None
    assert (outcome.code, outcome.error.retryable, outcome.generation.content) == (code, retryable, "a")


def test_oddity_29_a_server_that_ignores_the_header() -> None:
    body = {"output": {"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}]}, "usage": USAGE}
    outcome = Outcome.of_whole(DashScopeDecoder(), orjson.dumps(body))
    assert (outcome.generation.content, outcome.finish, outcome.usage) == ("a", "stop", USAGE)


@pytest.mark.parametrize(
    "texts",
    [
        ["我是", "我是阿里", "我是阿里云", "我是阿里云。", "我是阿里云。"],
        ["Hello", "Hello! How can I assist you today?"],
        ["Hm", "Hm, ha", "Hm, ha ha", "Hm, ha ha"],
    ],
)
def test_oddity_34_the_whole_text_with_every_frame(texts: list[str]) -> None:
    outcome = decode(*(message(text) for text in texts), message(texts[-1], "stop"))
    assert outcome.generation.content == texts[-1]


@pytest.mark.parametrize("texts", [["ha", "ha", "ha"], ["a", "ab", "c"], ["1", "10"]])
def test_oddity_34_increments_that_repeat_each_other_stay_increments(texts: list[str]) -> None:
    assert decode(*(message(text) for text in texts), STOP).generation.content == "".join(texts)


def test_oddity_34_reasoning_content_and_calls_that_grow() -> None:
    thoughts = [message("", reasoning_content=text) for text in ("Hm", "Hm, w", "Hm, well", "Hm, well.")]
    calls = [
        message(
            "It", reasoning_content="Hm, well.", tool_calls=[{"id": "c", "function": {"name": "f", "arguments": a}}]
        )
        for a in ("", '{"a"', '{"a": 1}', '{"a": 1}')
    ]
    outcome = decode(*thoughts, message("I", reasoning_content="Hm, well."), *calls, message("It is", "stop"))
    generation = outcome.generation
    assert (generation.reasoning, generation.content, outcome.calls) == ("Hm, well.", "It is", [("c", "f", '{"a": 1}')])


def test_oddity_35_the_first_id_stays() -> None:
    frames = [result({"text": t, "finish_reason": "null"}, request_id=t) for t in "ab"]
    assert decode(*frames, STOP).decoder.response_id == "a"


def test_a_held_text_comes_out_when_the_stream_is_cut() -> None:
    outcome = decode(message("1"), message("10"))
    assert (outcome.generation.content, outcome.code) == ("110", "truncated")


NAMES = [
    "output",
    "choices",
    "message",
    "content",
    "text",
    "tool_calls",
    "function",
    "arguments",
    "id",
    "index",
    "code",
]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 2)
    | st.sampled_from(["a", "ab", "abc", "abcd", "stop", "null", "\ud83d"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*NAMES, "reasoning_content", "finish_reason", "usage"]), inner, max_size=5)
    ),
    max_leaves=12,
)
TEXTS = st.sampled_from(["", "a", "ab", "abc", "abcd", "b", "null", "世"])
FRAMES = st.one_of(
    st.tuples(TEXTS, TEXTS).map(lambda pair: message(pair[0], reasoning_content=pair[1])),
    st.just(STOP),
    st.just(THROTTLED),
    st.binary(max_size=20),
    JSON.map(lambda value: b"data:" + json.dumps({"output": value}).encode() + b"\n\n"),
)


@given(st.lists(FRAMES, max_size=6).map(b"".join), st.lists(st.integers(0, 5000), max_size=8))
def test_the_whole_outcome_does_not_depend_on_how_the_bytes_are_cut(stream: bytes, at: list[int]) -> None:
    whole = decode(stream)
    assert decode(*cut_at(stream, at)) == whole
    assert all(data.decode() for _, data in whole.deltas), "valid UTF-8, never empty"
    assert whole.generation, "and what comes out can be folded"


@given(st.lists(st.text("ab世", min_size=1, max_size=4), min_size=3, max_size=10))
def test_increments_of_ordinary_text_are_joined(pieces: list[str]) -> None:
    if pieces[1].startswith(pieces[0]) and (len(pieces[0]) >= 4 or pieces[2].startswith(pieces[1])):
        return
    assert decode(*map(message, pieces), STOP).generation.content == "".join(pieces)
