"""Chat Completions decoding. The numbered tests are the oddities of real servers that break naive parsers."""

import json
from base64 import b64encode
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltafan._events import Delta
from deltafan_worker._chat import ChatDecoder
from deltafan_worker._sse import SseDecoder
from support.decoding import Outcome, cut_at
from support.reference_decoders import chat_outcome

STOP = {"index": 0, "delta": {}, "finish_reason": "stop"}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def frame(*choices: Any, **fields: Any) -> bytes:
    return b"data: " + orjson.dumps({"id": "c1", "choices": list(choices), **fields}) + b"\n\n"


def delta(**fields: Any) -> bytes:
    return frame({"index": 0, "delta": fields, "finish_reason": None})


def tool(**fields: Any) -> bytes:
    return delta(tool_calls=[fields])


def decode(*pieces: bytes) -> Outcome:
    return Outcome(ChatDecoder(), *pieces)


def content(*pieces: bytes) -> str:
    outcome = decode(*pieces)
    assert outcome.error is None, outcome.error
    return outcome.generation.content


def test_an_ordinary_stream() -> None:
    outcome = decode(
        delta(role="assistant", content=""), delta(content="He"), delta(content="y"), frame(STOP), frame(usage=USAGE)
    )
    assert outcome.deltas == [("content", b"He"), ("content", b"y")]
    assert (outcome.finish, outcome.usage, outcome.decoder.response_id) == ("stop", USAGE, "c1")
    assert outcome.decoder.frames == 5


def test_oddity_01_data_without_a_space() -> None:
    assert content(delta(content="a").replace(b"data: ", b"data:"), frame(STOP)) == "a"


def test_oddity_02_crlf_and_cr() -> None:
    stream = delta(content="a") + frame(STOP)
    for end in (b"\r\n", b"\r"):
        assert content(*[bytes([byte]) for byte in stream.replace(b"\n", end)]) == "a"


def test_oddity_03_byte_order_mark() -> None:
    assert content(b"\xef\xbb\xbf" + delta(content="a") + frame(STOP)) == "a"


def test_oddity_04_json_over_several_data_lines() -> None:
    assert content(b'data: {"choices": [{"index": 0,\ndata: "delta": {"content": "a"}}]}\n\n', frame(STOP)) == "a"


def test_oddity_05_a_character_cut_between_reads() -> None:
    stream = delta(content="é漢🌍") + frame(STOP)
    assert content(*[bytes([byte]) for byte in stream]) == "é漢🌍"


def test_oddity_06_unicode_line_separators_inside_json() -> None:
    assert content(delta(content="a\u2028b\u0085c\x0cd"), frame(STOP)) == "a\u2028b\u0085c\x0cd"


@pytest.mark.parametrize("noise", [b": ping\n\n", b"data:\n\n", b"event: ping\n\n", b"retry: 5\n\n", b"\n\n"])
def test_oddity_07_keep_alives_after_an_id(noise: bytes) -> None:
    assert content(b"id: 1\n" + delta(content="a") + noise + delta(content="b"), frame(STOP)) == "ab"


def test_oddity_08_frames_without_blank_lines() -> None:
    lines = (delta(content="a") + delta(content="b") + frame(STOP)).replace(b"\n\n", b"\n")
    assert content(lines + b"data: [DONE]\n") == "ab"


def test_oddity_09_no_last_newline_and_no_done() -> None:
    assert content(delta(content="a"), frame(STOP).rstrip()) == "a"


def test_oddity_10_a_line_of_a_mebibyte() -> None:
    assert content(delta(content="x" * (1 << 20)), frame(STOP)) == "x" * (1 << 20)


def test_oddity_11_comments_are_no_data_frames() -> None:
    decoder = ChatDecoder()
    decoder.feed(b": keep-alive\n\n" * 50)
    assert decoder.next_delta() is None
    assert decoder.frames == 0


@pytest.mark.parametrize(
    "ping", [b"event: ping\ndata: 1\n\n", b"event: ping\ndata: {}\n\n", b'data: {"type": "ping"}\n\n']
)
def test_oddity_11_pings_are_no_data_frames(ping: bytes) -> None:
    outcome = decode(ping, delta(content="a"), ping, frame(STOP))
    assert (outcome.generation.content, outcome.finish, outcome.decoder.frames) == ("a", "stop", 2)


def test_oddity_08_the_first_frame_is_not_held_back_by_the_missing_blank_lines() -> None:
    decoder = ChatDecoder()
    decoder.feed((delta(content="a") + delta(content="b")).replace(b"\n\n", b"\n"))
    assert decoder.next_delta() == Delta("content", b"a")


@pytest.mark.parametrize("chunk", [{"choices": None}, {}, {"choices": []}, {"choices": "no"}, {"choices": [None]}])
def test_oddity_13_choices_null_missing_or_empty(chunk: dict[str, Any]) -> None:
    assert content(b"data: " + orjson.dumps(chunk) + b"\n\n", delta(content="a"), frame(STOP)) == "a"


def test_oddity_14_azures_first_chunk() -> None:
    first = {
        "choices": [],
        "created": 0,
        "id": "",
        "model": "",
        "object": "",
        "prompt_filter_results": [{"prompt_index": 0}],
    }
    outcome = decode(b"data: " + orjson.dumps(first) + b"\n\n", delta(content="a"), frame(STOP))
    assert (outcome.generation.content, outcome.decoder.response_id) == ("a", "c1")


def test_oddity_15_delta_null_or_empty() -> None:
    null = frame({"index": 0, "delta": None, "finish_reason": None})
    assert (
        content(null, delta(), delta(content="a"), frame({"index": 0, "delta": None, "finish_reason": "stop"})) == "a"
    )


@pytest.mark.parametrize("running", [{}, {"finish_reason": ""}, {"finish_reason": "null"}, {"finish_reason": None}])
def test_oddity_16_no_finish_reason_in_all_its_forms(running: dict[str, Any]) -> None:
    outcome = decode(frame({"index": 0, "delta": {"content": "a"}, **running}))
    assert outcome.code == "truncated"
    assert outcome.error is not None
    assert outcome.error.retryable


def test_oddity_17_the_finish_chunk_twice() -> None:
    length = {"index": 0, "delta": {"content": ""}, "finish_reason": "length"}
    assert decode(delta(content="a"), frame(length), frame(STOP)).finish == "length"


@pytest.mark.parametrize(
    "stream",
    [
        [delta(content="a"), frame(STOP), frame(usage=USAGE)],
        [delta(content="a"), frame(STOP, usage=USAGE)],
        [
            frame({"index": 0, "delta": {"content": "a"}}, usage={"prompt_tokens": 3, "completion_tokens": 0}),
            frame(STOP, usage=USAGE),
        ],
        [
            delta(content="a"),
            frame(STOP),
            frame({"index": 0, "delta": {"content": ""}, "finish_reason": None}, usage=USAGE),
        ],
        [delta(content="a"), frame(STOP, usage=USAGE), frame(usage={}), frame(usage=None)],
    ],
    ids=["own chunk", "finish chunk", "every chunk", "with a choice", "empty ones after it"],
)
def test_oddity_18_the_five_places_of_usage(stream: list[bytes]) -> None:
    outcome = decode(*stream)
    assert (outcome.usage, outcome.finish, outcome.generation.content) == (USAGE, "stop", "a")


def calls(*pieces: bytes) -> list[tuple[str, str, str]]:
    outcome = decode(*pieces, frame({"index": 0, "delta": {}, "finish_reason": "tool_calls"}))
    assert outcome.error is None
    return [(call.id, call.name, call.arguments) for call in outcome.generation.tool_calls]


def test_oddity_19_a_continuation_has_an_empty_id() -> None:
    opener = tool(index=0, id="call_1", type="function", function={"name": "f", "arguments": ""})
    more = [tool(index=0, id="", type="function", function={"arguments": part}) for part in ('{"a"', ": 1}")]
    trailing = tool(function={"arguments": ""}, index=0, id="", type="function")
    outcome = decode(opener, *more, trailing, frame(STOP))
    assert [json.loads(data) for _, data in outcome.deltas] == [
        {"index": 0, "id": "call_1", "name": "f"},
        {"index": 0, "arguments": '{"a"'},
        {"index": 0, "arguments": ": 1}"},
    ]


def test_oddity_20_null_arguments_and_a_late_name() -> None:
    late = [
        tool(index=0, id="c", function={"arguments": None}),
        tool(index=0, function={"name": "f", "arguments": "{}"}),
    ]
    assert calls(*late, tool(index=0, function={"name": "f", "arguments": None})) == [("c", "f", "{}")]
    again = tool(index=0, id="c", function={"name": "f", "arguments": "{"})
    deltas = [json.loads(data) for _, data in decode(*late, again, frame(STOP)).deltas]
    assert [(piece.get("id"), piece.get("name")) for piece in deltas] == [("c", None), (None, "f"), (None, None)]


def test_oddity_21_calls_without_index_or_all_numbered_0() -> None:
    whole = [("a", "f", '{"x":1}'), ("b", "g", '{"y":2}')]
    for number in ({}, {"index": 0}):
        pieces = [tool(**number, id=i, function={"name": n, "arguments": a}) for i, n, a in whole]
        assert calls(*pieces) == whole
    assert calls(tool(id="a", function={"name": "f", "arguments": "{"}), tool(function={"arguments": "}"})) == [
        ("a", "f", "{}")
    ]


def test_oddity_22_several_fragments_in_one_chunk() -> None:
    both = delta(
        tool_calls=[
            {"index": 0, "id": "", "function": {"arguments": "}"}},
            {"index": 1, "id": "b", "function": {"name": "g", "arguments": "{"}},
            {"index": 1, "id": "", "function": {"arguments": "}"}},
        ]
    )
    assert calls(tool(index=0, id="a", function={"name": "f", "arguments": "{"}), both) == [
        ("a", "f", "{}"),
        ("b", "g", "{}"),
    ]


def test_oddity_23_stop_with_tool_calls() -> None:
    outcome = decode(tool(index=0, id="a", function={"name": "f", "arguments": ""}), frame(STOP))
    assert (outcome.finish, [call.arguments for call in outcome.generation.tool_calls]) == ("stop", ["{}"])


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), ("", ""), ([], ""), ([{"type": "text", "text": "a"}], "a"), (7, "")]
)
def test_oddity_24_content_in_all_its_forms(value: Any, text: str) -> None:
    assert content(delta(content=value), frame(STOP)) == text


def test_oddity_25_reasoning_and_content_in_one_chunk() -> None:
    outcome = decode(delta(content="b", reasoning_content="a"), frame(STOP))
    assert outcome.deltas == [("reasoning", b"a"), ("content", b"b")]


def test_oddity_26_both_names_of_reasoning() -> None:
    assert (
        decode(delta(reasoning="a"), delta(reasoning_content="b", content=None), frame(STOP)).generation.reasoning
        == "ab"
    )


NATIVE = (
    'id:1\nevent:error\n:HTTP_STATUS/429\ndata:{"request_id":"r1","code":"Throttling.AllocationQuota",'
    '"message":"Allocated quota exceeded, please increase your quota limit."}'
)


@pytest.mark.parametrize(
    ("stream", "code", "retryable", "status"),
    [
        (
            frame({"index": 0, "delta": {"content": NATIVE}, "finish_reason": "error_finish"}),
            "Throttling.AllocationQuota",
            True,
            429,
        ),
        (
            b'data: {"error": {"message": "no", "type": "data_inspection_failed"}}\n\n',
            "data_inspection_failed",
            False,
            None,
        ),
        (b'data: {"error": {"message": "busy", "code": 503}}\n\ndata: [DONE]\n\n', "stream_error", True, 503),
        (b'data: {"object": "error", "message": "gone", "type": "server_error"}\n\n', "server_error", True, None),
        (
            frame({"index": 0, "delta": {}, "finish_reason": "error"}, error={"code": 400, "message": "bad"}),
            "stream_error",
            False,
            400,
        ),
        (
            b'event: error\ndata: {"error": {"code": "tool_use_failed", "status_code": 400}}\n\n',
            "tool_use_failed",
            False,
            400,
        ),
        (b'data: {"code": "InternalError", "message": "m", "request_id": "r"}\n\n', "InternalError", True, None),
        (frame({"index": 0, "delta": {}}, error={"code": "slow_down", "message": "m"}), "slow_down", True, None),
        (b"event: error\n" + frame({"index": 0, "delta": {}}, code="InternalError"), "InternalError", True, None),
    ],
)
def test_oddity_27_errors_inside_a_200(stream: bytes, code: str, retryable: bool, status: int | None) -> None:
    outcome = decode(delta(content="a") + stream)
    assert outcome.deltas == [("content", b"a")], "what came before stands, and the error's text is no output"
    assert outcome.error is not None
    assert (outcome.code, outcome.error.retryable, outcome.error.status) == (code, retryable, status)


def test_an_error_behind_the_finish_takes_nothing_back() -> None:
    late = frame(
        {"index": 0, "delta": {}, "finish_reason": None}, error={"code": 400, "message": "Token limit reached"}
    )
    outcome = decode(delta(content="a"), frame({"index": 0, "delta": {}, "finish_reason": "length"}), late)
    assert (outcome.finish, outcome.error) == ("length", None)


@pytest.mark.parametrize(
    "late",
    [
        frame({"index": 0, "delta": {"content": NATIVE}, "finish_reason": "error_finish"}),
        b"data: {not json}\n\n",
        b"data: " + b"x" * 1001,
    ],
    ids=["error_finish", "no json", "too long"],
)
def test_oddity_27_nothing_behind_the_finish_is_output_or_an_error(late: bytes) -> None:
    decoder = ChatDecoder()
    decoder._sse = SseDecoder(limit_bytes=1000)
    outcome = Outcome(decoder, delta(content="a"), frame(STOP, usage=USAGE), late)
    assert (outcome.deltas, outcome.finish, outcome.usage) == ([("content", b"a")], "stop", USAGE)


def test_oddity_29_a_server_that_ignores_stream() -> None:
    message = {
        "role": "assistant",
        "content": "b",
        "reasoning_content": "a",
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    }
    decoder = ChatDecoder()
    whole = {"id": "x", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": USAGE}
    decoder.feed_whole(orjson.dumps(whole))
    kinds = []
    while (item := decoder.next_delta()) is not None:
        kinds.append(item.type)
    assert kinds == ["reasoning", "content", "tool_call"]
    assert (decoder.completion().finish_reason, decoder.usage, decoder.finished) == ("stop", USAGE, True)


def test_oddity_35_the_first_id_stays() -> None:
    outcome = decode(delta(content="a"), delta(content="b").replace(b"c1", b"c2"), frame(STOP))
    assert outcome.decoder.response_id == "c1"


def test_only_choice_0_is_streamed() -> None:
    other = frame({"index": 1, "delta": {"content": "no"}, "finish_reason": "stop"})
    assert content(other, delta(content="a"), other, frame(STOP)) == "a"


def test_done_completes_what_never_got_a_finish_reason() -> None:
    outcome = decode(delta(content="a"), b"data: [DONE]\n\n")
    assert (outcome.finish, outcome.decoder.finished) == ("stop", True)
    assert decode(b"data: [DONE]\n\n").code == "truncated"


def test_a_frame_that_is_no_object_is_an_error_that_does_not_quote_it() -> None:
    for bad in (b"data: {not json: secret}\n\n", b"data: [1]\n\n", b"data: " + b"[" * 100_000 + b"\n\n"):
        outcome = decode(delta(content="a"), bad)
        assert (outcome.code, outcome.deltas) == ("bad_frame", [("content", b"a")])
        assert "secret" not in outcome.error.message  # type: ignore[union-attr]


def test_halves_of_a_surrogate_pair_in_two_deltas_are_one_character() -> None:
    halves = [
        b'data: {"choices":[{"index":0,"delta":{"content":"a\\ud83c"}}]}\n\n',
        b'data: {"choices":[{"index":0,"delta":{"content":"\\udf0db"}}]}\n\n',
    ]
    assert content(*halves, frame(STOP)) == "a🌍b"
    assert content(halves[0], frame(STOP)) == "a\ufffd"
    assert content(halves[1], frame(STOP)) == "\ufffdb"


def test_broken_utf8_is_replaced() -> None:
    assert content(b'data: {"choices":[{"index":0,"delta":{"content":"a\xff"}}]}\n\n', frame(STOP)) == "a\ufffd"


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
FRAMES = st.lists(
    st.one_of(
        TEXT.map(lambda t: delta(content=t)),
        TEXT.map(lambda t: delta(content=None, reasoning_content=t)),
        TEXT.map(lambda t: delta(refusal=t)),
        st.tuples(TEXT, TEXT).map(lambda t: delta(content=t[0], reasoning=t[1])),
        st.tuples(st.integers(0, 2), TEXT).map(
            lambda t: tool(index=t[0], function={"name": f"f{t[0]}", "arguments": t[1]})
        ),
        st.integers(0, 9).map(lambda n: frame(usage={"completion_tokens": n})),
        st.just(b": ping\n\n"),
        st.just(frame(STOP)),
    ),
    max_size=10,
).map(b"".join)


@given(FRAMES, st.lists(st.integers(0, 5000), max_size=10))
def test_agrees_with_the_reference(stream: bytes, at: list[int]) -> None:
    outcome, expected = decode(*cut_at(stream, at)), chat_outcome(stream)
    generation = outcome.generation
    assert (generation.reasoning, generation.content, generation.refusal) == (
        expected["reasoning"],
        expected["content"],
        expected["refusal"],
    )
    named = [(call.name, call.arguments) for call in generation.tool_calls]
    assert sorted(named) == sorted((tool["name"], tool["arguments"] or "{}") for tool in expected["tools"])
    assert outcome.finish == expected["finish"]
    assert outcome.usage == expected["usage"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "choices",
                    "delta",
                    "content",
                    "tool_calls",
                    "function",
                    "index",
                    "id",
                    "error",
                    "code",
                    "usage",
                    "finish_reason",
                    "name",
                    "arguments",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
WILD = st.lists(
    st.one_of(st.binary(max_size=30), JSON.map(lambda value: b"data: " + json.dumps(value).encode() + b"\n\n"), FRAMES),
    max_size=5,
)


@given(WILD.map(b"".join), st.lists(st.integers(0, 5000), max_size=10))
def test_the_whole_outcome_does_not_depend_on_how_the_bytes_are_cut(stream: bytes, at: list[int]) -> None:
    whole = decode(stream)
    assert decode(*cut_at(stream, at)) == whole
    assert decode(*[bytes([byte]) for byte in stream]) == whole
    assert all(data.decode() for _, data in whole.deltas), "valid UTF-8, never empty"


def test_oddity_24_the_word_null_stands_for_nothing_beside_other_output() -> None:
    outcome = decode(delta(content="null", reasoning_content="Hm."), delta(content="null"), frame(STOP))
    assert (outcome.generation.reasoning, outcome.generation.content) == ("Hm.", "null")


def test_speech_comes_in_whole_base64_and_the_words_beside_it() -> None:
    speech = b64encode(bytes(range(10))).decode()
    pieces = [{"id": "a", "transcript": "Hi"}, {"data": speech[:5]}, {"data": speech[5:]}, {"expires_at": 1}]
    outcome = decode(*(frame({"index": 0, "delta": {"audio": piece}}) for piece in pieces), frame(STOP))
    assert (outcome.generation.pcm, outcome.generation.transcript) == (bytes(range(10)), "Hi")
    assert [kind for kind, _ in outcome.deltas] == ["audio"] * 3


@pytest.mark.parametrize("cut", range(13))
def test_base64_may_be_cut_anywhere(cut: int) -> None:
    speech = b64encode(bytes(range(7))).decode()
    pieces = [{"data": speech[:cut]}, {"data": speech[cut:]}]
    outcome = decode(*(delta(audio=piece) for piece in pieces), frame(STOP))
    assert outcome.generation.pcm == bytes(range(7))


@pytest.mark.parametrize("data", ["A=======", "é漢字é", "\ud83d" * 4, "====", "AAAAA=AA"])
def test_speech_that_is_not_base64_is_left_out(data: str) -> None:
    odd = b'data: {"choices":[{"index":0,"delta":{"audio":%b}}]}\n\n' % json.dumps({"data": data}).encode()
    assert decode(odd, delta(audio={"data": "AAAA"}), frame(STOP)).generation.pcm[-3:] == bytes(3)


def test_odd_values_can_be_written() -> None:
    """Halves of UTF-16 pairs, and a nest that can be read and not written, in all that goes into the records."""
    half, nest = "\ud83d", json.loads('[{"a":' * 200 + "1" + "}]" * 200)
    function = {"name": half, "arguments": {"a": half, half: nest}}
    pieces: list[dict[str, Any]] = [
        {"annotations": [{"url": half, "nest": nest}]},
        {"tool_calls": [{"index": 0, "id": half, "function": function, "extra_content": {"a": half}}]},
        {"audio": {"transcript": half}},
    ]
    chunks = [{"id": half, "choices": [{"index": 0, "delta": piece}]} for piece in pieces]
    chunks.append({"choices": [{"index": 0, "finish_reason": half}]})
    outcome = decode(*(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks))
    assert (outcome.finish, outcome.decoder.response_id) == ("\ufffd", "\ufffd")
    assert orjson.dumps(outcome.generation.to_json())
    (call,) = outcome.generation.tool_calls
    assert (call.id, call.name, json.loads(call.arguments)["a"]) == ("\ufffd",) * 3


def test_sources_are_given_once() -> None:
    source = {"type": "url_citation", "url_citation": {"url": "http://a", "title": "世"}}
    outcome = decode(delta(annotations=[source]), delta(content="x", annotations=[source, 1, {}]), frame(STOP))
    assert [kind for kind, _ in outcome.deltas] == ["annotation", "content"]
    assert outcome.generation.annotations[0]["type"] == "url_citation"


def test_what_a_provider_wants_back_with_a_call_is_kept() -> None:
    extra = {"google": {"thought_signature": "abc"}}
    outcome = decode(tool(id="a", function={"name": "f", "arguments": "{}"}, extra_content=extra), frame(STOP))
    assert outcome.generation.tool_calls[0].extra == {"extra_content": extra}
