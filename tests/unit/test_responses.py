"""Responses decoding. The numbered tests are the oddities of real servers that break naive parsers."""

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltafan_worker._responses import ResponsesDecoder
from support.decoding import Outcome, cut_at

USAGE = {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5}


def event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: ".encode() + orjson.dumps({"type": kind, **fields}) + b"\n\n"


def text(piece: str, **fields: Any) -> bytes:
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0, "sequence_number": 1}
    return event("response.output_text.delta", delta=piece, **{**place, **fields})


def completed(*output: Any, **fields: Any) -> bytes:
    response = {"id": "resp_1", "object": "response", "status": "completed", "output": list(output), "usage": USAGE}
    return event("response.completed", response={**response, **fields})


def call_item(**fields: Any) -> dict[str, Any]:
    item = {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "f", "arguments": ""}
    return {**item, **fields}


def decode(*pieces: bytes) -> Outcome:
    return Outcome(ResponsesDecoder(), *pieces)


CREATED = event("response.created", response={"id": "resp_1", "status": "in_progress", "output": []})
MESSAGE = {"type": "message", "id": "msg_1", "content": [{"type": "output_text", "text": "Hey"}]}


def test_an_ordinary_stream() -> None:
    outcome = decode(
        CREATED,
        event("response.output_item.added", output_index=0, item={**MESSAGE, "content": []}),
        event("response.content_part.added", output_index=0, item_id="msg_1", part={"type": "output_text", "text": ""}),
        text("He"),
        text("y"),
        event("response.output_text.done", output_index=0, item_id="msg_1", text="Hey"),
        event("response.output_item.done", output_index=0, item=MESSAGE),
        completed(MESSAGE),
    )
    assert outcome.deltas == [("content", b"He"), ("content", b"y")]
    assert (outcome.finish, outcome.usage, outcome.decoder.response_id) == ("stop", USAGE, "resp_1")
    assert outcome.decoder.finished


def test_reasoning_text_and_summaries() -> None:
    raw = decode(
        event("response.reasoning_text.delta", delta="Hm.", output_index=0), text("a", output_index=1), completed()
    )
    assert [kind for kind, _ in raw.deltas] == ["reasoning", "content"]
    parts = [
        event("response.reasoning_summary_text.delta", delta=piece, output_index=0, summary_index=part, item_id="rs")
        for part, piece in ((0, "First"), (0, "."), (1, "Second."))
    ]
    item = {"type": "reasoning", "id": "rs", "summary": [{"type": "summary_text", "text": "First."}]}
    summary = decode(*parts, event("response.output_item.done", output_index=0, item=item), text("a"), completed(item))
    assert summary.generation.reasoning == "First.\n\nSecond."


def test_a_refusal() -> None:
    part = {"output_index": 0, "item_id": "msg_1", "content_index": 0}
    item = {"type": "message", "id": "msg_1", "content": [{"type": "refusal", "refusal": "No."}]}
    outcome = decode(
        event("response.refusal.delta", delta="No.", **part),
        event("response.refusal.done", refusal="No.", **part),
        completed(item),
    )
    assert outcome.generation.refusal == "No."
    assert decode(completed(item)).generation.refusal == "No."


def test_function_calls_streamed() -> None:
    place = {"output_index": 0, "item_id": "fc_1"}
    outcome = decode(
        event("response.output_item.added", output_index=0, item=call_item()),
        event("response.function_call_arguments.delta", delta='{"a"', **place),
        event("response.function_call_arguments.delta", delta=":1}", **place),
        event("response.function_call_arguments.done", arguments='{"a":1}', **place),
        event("response.output_item.done", output_index=0, item=call_item(arguments='{"a":1}')),
        completed(call_item(arguments='{"a":1}')),
    )
    assert outcome.calls == [("call_1", "f", '{"a":1}')]
    assert outcome.finish == "tool_calls"
    assert [json.loads(data).get("arguments") for _, data in outcome.deltas] == [None, '{"a"', ":1}"]


@pytest.mark.parametrize(
    "stream",
    [
        [event("response.output_item.added", output_index=0, item=call_item(arguments="{}")), completed()],
        [event("response.output_item.done", output_index=0, item=call_item(arguments="{}")), completed()],
        [
            event("response.output_item.added", output_index=0, item=call_item()),
            event("response.function_call_arguments.done", output_index=0, arguments="{}"),
            completed(call_item(arguments="{}")),
        ],
        [
            event("response.output_item.added", output_index=0, item=call_item()),
            event("response.output_item.done", output_index=1, item=call_item(arguments="{}")),
            completed(),
        ],
        [completed(call_item(arguments="{}"))],
        [event("response.output_item.added", item=call_item()), completed()],
    ],
)
def test_a_function_call_wherever_it_appears(stream: list[bytes]) -> None:
    outcome = decode(*stream)
    assert (outcome.calls, outcome.finish) == ([("call_1", "f", "{}")], "tool_calls")


def test_arguments_may_come_as_an_object() -> None:
    added = event("response.output_item.added", output_index=0, item=call_item(arguments={}))
    done = event("response.output_item.done", output_index=0, item=call_item(arguments={"a": 1}))
    assert decode(added, done, completed()).calls == [("call_1", "f", '{"a":1}')]
    for only in (completed(call_item(arguments={"a": 1})), added.replace(b"{}", b'{"a":1}') + completed()):
        assert decode(only).calls == [("call_1", "f", '{"a":1}')]


def test_pieces_of_a_call_that_has_not_been_opened_go_to_no_other() -> None:
    second = call_item(id="fc_2", call_id="call_2")
    outcome = decode(
        event("response.output_item.done", output_index=0, item=call_item(arguments="{}")),
        event("response.function_call_arguments.delta", output_index=1, item_id="fc_2", delta='{"b"'),
        event("response.output_item.added", output_index=1, item=second),
        event("response.output_item.done", output_index=1, item={**second, "arguments": '{"b":2}'}),
        completed(),
    )
    assert outcome.calls == [("call_1", "f", "{}"), ("call_2", "f", '{"b":2}')]


def test_encrypted_reasoning_is_kept_with_the_call_that_it_led_to() -> None:
    thought = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAA"}
    outcome = decode(
        event("response.output_item.added", output_index=0, item=thought),
        event("response.output_item.done", output_index=0, item=thought),
        event("response.output_item.done", output_index=1, item=call_item(arguments="{}")),
        event("response.output_item.done", output_index=2, item=call_item(id="fc_2", call_id="call_2")),
        completed(thought),
    )
    assert [call.extra for call in outcome.generation.tool_calls] == [{"reasoning": [thought]}, None]


def test_custom_tools_have_input_for_arguments() -> None:
    item = {"type": "custom_tool_call", "id": "ct", "call_id": "call_1", "name": "f", "input": ""}
    outcome = decode(
        event("response.output_item.added", output_index=0, item=item),
        event("response.custom_tool_call_input.delta", output_index=0, item_id="ct", delta="SELECT 1"),
        event("response.output_item.done", output_index=0, item={**item, "input": "SELECT 1"}),
        completed(),
    )
    assert outcome.calls == [("call_1", "f", "SELECT 1")]


@pytest.mark.parametrize(
    ("reason", "finish"),
    [("max_output_tokens", "length"), ("max_tokens", "length"), ("content_filter", "content_filter")],
)
def test_an_incomplete_answer_says_why(reason: str, finish: str) -> None:
    end = event("response.incomplete", response={"status": "incomplete", "incomplete_details": {"reason": reason}})
    assert decode(text("a"), end).finish == finish


def test_sources_and_speech() -> None:
    outcome = decode(
        event("response.output_text.annotation.added", annotation={"type": "url_citation", "url": "http://a"}),
        event("response.audio.delta", delta="AAAA"),
        event("response.audio.transcript.delta", delta="Hi"),
        completed(),
    )
    assert [kind for kind, _ in outcome.deltas] == ["annotation", "audio", "audio"]


def test_oddity_07_keep_alives_after_an_id() -> None:
    assert decode(b"id:1\n" + text("a"), b": ping\n\n", b"event: ping\n\n", b"data:\n\n", completed()).finish == "stop"


def test_oddity_18_usage_may_be_missing() -> None:
    outcome = decode(text("a"), completed(usage=None))
    assert (outcome.finish, outcome.usage) == ("stop", None)


QUOTA = {"code": "insufficient_quota", "message": "You exceeded your current quota"}


@pytest.mark.parametrize(
    ("stream", "code"),
    [
        (event("error", sequence_number=2, error={"type": "x", **QUOTA}), "insufficient_quota"),
        (event("error", sequence_number=2, param=None, **QUOTA), "insufficient_quota"),
        (event("response.failed", response={"id": "r", "status": "failed", "error": QUOTA}), "insufficient_quota"),
        (event("response.failed", response={"id": "r", "status": "failed", "error": None}), "failed"),
        (b'event:error\n:HTTP_STATUS/429\ndata:{"code":"Throttling","message":"slow"}\n\n', "Throttling"),
        (b'data: {"error":{"message":"down","type":"server_error","code":null}}\n\n', "server_error"),
        (b'data: {"request_id":"r","code":"InternalError","message":"m"}\n\n', "InternalError"),
    ],
)
def test_oddity_27_errors_inside_a_200(stream: bytes, code: str) -> None:
    outcome = decode(CREATED, text("a"), stream)
    assert (outcome.code, outcome.finish, outcome.generation.content) == (code, None, "a")


def test_a_failed_response_has_its_status_in_a_comment() -> None:
    failed = event("response.failed", response={"status": "failed", "error": {"code": "odd", "message": "m"}})
    error = decode(failed.replace(b"data:", b":HTTP_STATUS/400\ndata:")).error
    assert error is not None
    assert (error.status, error.retryable) == (400, False)


def test_oddity_29_a_server_that_ignores_stream() -> None:
    items = [{"type": "reasoning", "id": "r", "content": [{"text": "Hm."}]}, MESSAGE, call_item(arguments="{}")]
    whole = {"id": "resp_1", "object": "response", "status": "completed", "output": items, "usage": USAGE}
    outcome = Outcome.of_whole(ResponsesDecoder(), orjson.dumps(whole))
    assert [kind for kind, _ in outcome.deltas] == ["reasoning", "content", "tool_call"]
    assert (outcome.finish, outcome.usage) == ("tool_calls", USAGE)
    failed = {"object": "response", "status": "failed", "error": QUOTA}
    assert Outcome.of_whole(ResponsesDecoder(), orjson.dumps(failed)).code == "insufficient_quota"


def test_oddity_30_events_that_lack_half_of_their_fields() -> None:
    reasoning = {"type": "reasoning", "id": "msg_5", "summary": [{"type": "summary_text", "text": "Hm."}]}
    outcome = decode(
        b'data:{"type":"response.created","response":{"id":"r","status":"queued","model":""}}\n\n',
        event("response.output_item.added", output_index=0, item={"type": "reasoning", "id": "msg_5", "summary": []}),
        event("response.reasoning_text.delta", delta="Hm.", output_index=0, item_id="msg_5"),
        event("response.output_item.done", output_index=1, item=reasoning),
        event("response.output_item.added", output_index=5, item={"type": "message", "id": "msg_final", "content": []}),
        event("response.output_text.delta", delta="a", output_index=5),
        event("response.output_item.done", output_index=6, item={**MESSAGE, "id": "msg_final"}),
        completed(reasoning, {**MESSAGE, "id": "msg_final"}),
    )
    assert (outcome.generation.reasoning, outcome.generation.content, outcome.finish) == ("Hm.", "a", "stop")


def test_oddity_30_an_error_that_is_told_twice_is_one() -> None:
    failed = event("response.failed", response={"status": "failed", "error": {"code": "other", "message": "m"}})
    outcome = decode(CREATED, event("error", error=QUOTA) + failed)
    assert outcome.code == "insufficient_quota"


def test_oddity_31_item_ids_that_change_with_every_event() -> None:
    outcome = decode(
        event("response.output_item.added", output_index=0, item={"type": "message", "id": "a1", "content": []}),
        text("He", item_id="a2"),
        text("y", item_id="a3"),
        event("response.output_text.done", text="Hey", output_index=0, item_id="a4"),
        event("response.output_item.done", output_index=0, item={**MESSAGE, "id": "a5"}),
        event("response.output_item.added", output_index=1, item=call_item(id="b1")),
        event("response.function_call_arguments.delta", delta="{}", output_index=1, item_id="b2"),
        event("response.output_item.done", output_index=1, item=call_item(id="b3", arguments="{}")),
        completed({**MESSAGE, "id": "a6"}, call_item(id="b4", arguments="{}")),
    )
    assert (outcome.generation.content, outcome.calls) == ("Hey", [("call_1", "f", "{}")])


def test_oddity_31_calls_whose_pieces_alternate_are_told_apart_by_their_index() -> None:
    opened = [
        event("response.output_item.added", output_index=n, item=call_item(id=f"a{n}", call_id=f"call_{n}"))
        for n in (0, 1)
    ]
    pieces = [
        event("response.function_call_arguments.delta", output_index=n, item_id=f"b{at}", delta=piece)
        for at, (n, piece) in enumerate([(0, "{"), (1, "["), (0, "}"), (1, "]")])
    ]
    assert decode(*opened, *pieces, completed()).calls == [("call_0", "f", "{}"), ("call_1", "f", "[]")]


@pytest.mark.parametrize("name", ["parallel", "multi_tool_use.parallel"])
def test_oddity_32_several_calls_wrapped_in_one_that_nobody_declared(name: str) -> None:
    uses = [{"recipient_name": "functions.a", "parameters": {"x": 1}}, {"recipient_name": "b", "parameters": {}}]
    arguments = json.dumps({"tool_uses": uses})
    outcome = decode(
        event("response.output_item.added", output_index=0, item=call_item(name=name)),
        event("response.function_call_arguments.delta", delta=arguments[:9], output_index=0),
        event("response.function_call_arguments.delta", delta=arguments[9:], output_index=0),
        event("response.output_item.done", output_index=0, item=call_item(name=name, arguments=arguments)),
        completed(),
    )
    assert outcome.calls == [("call_1_1", "a", '{"x":1}'), ("call_1_2", "b", "{}")]
    own = decode(event("response.output_item.done", item=call_item(name=name, arguments='{"mine":1}')), completed())
    assert own.calls == [("call_1", name, '{"mine":1}')], "a tool may really be called so"


def test_oddity_33_done_after_the_end_and_a_growing_content_index() -> None:
    outcome = decode(text("He", content_index=0), text("y", content_index=1), completed(MESSAGE) + b"data: [DONE]\n\n")
    assert (outcome.generation.content, outcome.finish) == ("Hey", "stop")


def test_a_stream_that_stops_is_cut() -> None:
    assert decode(CREATED, text("a")).code == "truncated"
    assert decode(CREATED, text("a"), b"data: [DONE]\n\n").code == "truncated"


KINDS = [
    "response.output_text.delta",
    "response.output_text.done",
    "response.output_item.added",
    "response.output_item.done",
    "response.function_call_arguments.delta",
    "response.reasoning_summary_text.delta",
    "response.completed",
    "response.failed",
    "error",
    "response.unheard_of",
]
NAMES = [
    "type",
    "delta",
    "item",
    "output_index",
    "item_id",
    "call_id",
    "name",
    "arguments",
    "response",
    "output",
    "error",
]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 2)
    | st.sampled_from([*KINDS, "function_call", "message", "a", "{}", "\ud83d"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*NAMES, "content", "text"]), inner, max_size=5)
    ),
    max_leaves=12,
)
EVENTS = st.tuples(st.sampled_from(KINDS), st.dictionaries(st.sampled_from(NAMES[1:]), JSON, max_size=5)).map(
    lambda pair: b"data: " + json.dumps({"type": pair[0], **pair[1]}).encode() + b"\n\n"
)
WILD = st.lists(
    EVENTS | st.binary(max_size=20) | JSON.map(lambda j: b"data: " + json.dumps(j).encode() + b"\n\n"), max_size=6
)


@given(WILD.map(b"".join), st.lists(st.integers(0, 5000), max_size=8))
def test_the_whole_outcome_does_not_depend_on_how_the_bytes_are_cut(stream: bytes, at: list[int]) -> None:
    whole = decode(stream)
    assert decode(*cut_at(stream, at)) == whole
    assert all(data.decode() for _, data in whole.deltas), "valid UTF-8, never empty"
    assert whole.generation, "and what comes out can be folded"
