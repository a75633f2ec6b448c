"""Events that are like the one before: read without being parsed, and to the same end."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltafan_worker import _alike
from deltafan_worker._apis import APIS
from deltafan_worker._background import BackgroundDecoder
from support.decoding import Outcome

Say = Callable[..., bytes]
SEPARATORS = ((",", ":"), (", ", ": "))
TEXT = "THE TEXT"


def event(head: str, frame: dict[str, Any], text: str, style: int) -> bytes:
    def dumped(value: Any) -> str:
        return json.dumps(value, ensure_ascii=bool(style & 1), separators=SEPARATORS[style >> 1])

    data = dumped(frame).replace(f'"{TEXT}"', dumped(text))
    return f"{head}{data}\n\n".encode("utf-8", "surrogatepass")


def chat(text: str, n: int, /, key: str = "content", style: int = 0, **fields: Any) -> bytes:
    delta = {"content": "", "reasoning_content": None, key: TEXT}
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
    padding = "x" * (n % 5)
    frame = {"id": "chatcmpl-1", "created": n, "choices": [choice], "usage": None, "obfuscation": padding, **fields}
    return event("data: ", frame, text, style)


def responses(text: str, n: int, /, key: str = "content", style: int = 0, **fields: Any) -> bytes:
    kind = f"response.{'output_text' if key == 'content' else 'reasoning_text'}.delta"
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    frame = {"type": kind, "sequence_number": n, **place, "delta": TEXT, "obfuscation": "x" * (n % 5), **fields}
    return event(f"event: {kind}\ndata: ", frame, text, style)


def dashscope(text: str, n: int, /, key: str = "content", style: int = 0, **fields: Any) -> bytes:
    message = {"content": "", "reasoning_content": "", key: TEXT, "role": "assistant"}
    output = {"choices": [{"message": message, "finish_reason": "null"}]}
    usage = {"total_tokens": 9 + n, "output_tokens": n, "prompt_tokens_details": {"cached_tokens": 0}}
    frame = {"output": output, "usage": usage, "request_id": "d272255f", **fields}
    return event(f"id:{n}\nevent:result\n:HTTP_STATUS/200\ndata:", frame, text, style)


SAYS: dict[str, Say] = {"chat": chat, "responses": responses, "dashscope": dashscope}
ENDS = {
    "chat": b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n',
    "responses": b'data: {"type":"response.completed","response":{"id":"r","output":[{"type":"message","id":"msg_1",'
    b'"content":[{"type":"output_text","text":"ab"}]}]}}\n\n',
    "dashscope": b'data:{"output":{"choices":[{"message":{"content":""},"finish_reason":"stop"}]}}\n\n',
}


def chosen(finish: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def native(finish: str = "null", others: Any = (), **message: Any) -> dict[str, Any]:
    return {"output": {"choices": [{"message": message, "finish_reason": finish}], **dict(others)}}


SOURCE = {"type": "url_citation", "url": "u", "content": TEXT}
ODD_OF: dict[str, tuple[dict[str, Any], ...]] = {
    "chat": (
        {"error": {"message": "no"}},
        {"type": "ping"},
        {"id": ""},
        {"id": "another"},
        {"usage": {"total_tokens": 3}},
        {"usage": {"completion_tokens": 3, "content": TEXT}},
        chosen(content=TEXT, reasoning_content="so"),
        chosen(content=TEXT, reasoning_content=TEXT),
        chosen(content="null", reasoning_content=TEXT),
        chosen(content=TEXT, tool_calls=[{"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}]),
        chosen(tool_calls=[{"index": 0, "id": "c", "function": {"name": "f", "arguments": TEXT}}]),
        chosen(content=TEXT, annotations=[SOURCE]),
        chosen(content=[{"type": "text", "text": TEXT}]),
        chosen("stop", content=TEXT),
        chosen("error_finish", content=TEXT),
        chosen(role="assistant", content=TEXT),
        chosen(refusal=TEXT),
        {"choices": [{"index": 1, "delta": {"content": TEXT}}]},
        {"choices": [{"index": 0, "delta": {"content": TEXT}}, {"index": 1, "delta": {}}]},
        {"choices": [{"index": 1, "delta": {}}, {"index": 0, "delta": {"content": TEXT}}]},
        {"choices": [{"index": 0, "message": {"content": TEXT}}]},
    ),
    "responses": (
        {"type": "ping"},
        {"type": "response.output_text.done", "text": TEXT},
        {"type": "response.refusal.delta"},
        {"type": "response.reasoning_summary_text.delta", "summary_index": 0},
        {"type": "response.function_call_arguments.delta"},
        {"item_id": "msg_2"},
        {"item_id": ""},
        {"item_id": None, "output_index": None},
        {"output_index": 1},
        {"content_index": 7},
        {"id": TEXT},
    ),
    "dashscope": (
        {"code": "Throttling", "message": TEXT},
        {"usage": None},
        {"usage": {"total_tokens": 5, "plugins": TEXT}},
        {"request_id": ""},
        {"output": {"text": TEXT, "finish_reason": "null"}},
        {"output": {"message": {"content": TEXT, "phase": "KeepAlive"}}},
        native(content=TEXT, reasoning_content="so"),
        native("stop", content=TEXT),
        native(content=[{"text": TEXT}]),
        native(content=TEXT, tool_calls=[{"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}]),
        native(content=TEXT, others={"search_info": {"search_results": [{"url": "u"}]}}),
        native(content=TEXT, others={"audio": {"data": "AAAA"}}),
        native(content='[{"text": "a', others={"tool_info": None}),
    ),
}
REWRITTEN = (
    (b'"', b'"'),
    (b'"content"', b'"c\\u006fntent"'),
    (b'"content":', b'"content":"twin","content":'),
    (b'"content":', b'"content":"twin","c\\u006fntent":'),
    (b'"delta":"', b'"delta":"twin","d\\u0065lta":"'),
    (b'"obfuscation":"', b'"obfuscation":"\xff'),
    (b'"request_id":"', b'"request_id":"\xff'),
    (b"{", b"{ "),
    (b"{", b"{\r"),
    (b"}\n\n", b"}\r\n\n"),
    (b"}\n\n", b"}\r\n\r\n"),
    (b"\n\n", b"\n"),
    (b"data:", b"event: ping\ndata:"),
    (b"data:", b":HTTP_STATUS/429\ndata:"),
    (b"data:", b"data: {}\ndata:"),
    (b"data:", b": note\ndata:"),
)
TEXTS = st.one_of(
    st.text('ab\n"\\世🌍', max_size=4),
    st.sampled_from(("null", "", "\ud83d", "\udca1", "\u2028", "\x00", "a", "ab", "abc")),
)


@st.composite
def packets(draw: st.DrawFn, api: str) -> list[bytes]:
    """Packets of one or a few events, most of them alike, in runs that are odd in the same way; some bytes changed."""
    say, style = SAYS[api], draw(st.integers(0, 3))
    # Of these some decoders see that each is what it adds.
    events = [say(text, n, "content", style) for n, text in enumerate(("x", "y"))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        odd = draw(st.sampled_from(ODD_OF[api])) if draw(st.booleans()) else {}
        key = draw(st.sampled_from(("content", "content", "content", "reasoning_content")))
        change = draw(st.sampled_from(REWRITTEN)) if draw(st.booleans()) else REWRITTEN[0]
        texts = draw(st.lists(TEXTS, min_size=1, max_size=8))
        events += [say(text, len(events) + n, key, style, **odd).replace(*change, 1) for n, text in enumerate(texts)]
    events.append(ENDS[api])
    if draw(st.integers(0, 4)) == 0:
        at = draw(st.integers(0, len(events) - 1))
        changed, place = bytearray(events[at]), draw(st.integers(0, len(events[at]) - 1))
        changed[place] = draw(st.one_of(st.sampled_from(b'"\\{}\n\r:,0a\x00'), st.integers(0, 255)))
        events[at] = bytes(changed)
    packed, at = [], 0
    while at < len(events):
        size = draw(st.sampled_from((1, 1, 1, 2, 3)))
        packed.append(b"".join(events[at : at + size]))
        at += size
    return packed


@pytest.mark.parametrize("api", APIS)
@given(data=st.data())
@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
def test_the_outcome_does_not_depend_on_what_is_parsed(api: str, data: st.DataObject) -> None:
    taken, model = data.draw(packets(api)), data.draw(st.sampled_from(("qwen", "kimi")))
    parsed = Outcome(APIS[api].decoder(model), *taken, parses_all=True)
    assert Outcome(APIS[api].decoder(model), *taken) == parsed


def texts(api: str, *values: str, first: int = 0, **fields: Any) -> list[bytes]:
    return [SAYS[api](text, first + n, **fields) for n, text in enumerate(values or [f"{n}x" for n in range(8)])]


def said(item_id: str, tail: str = "", output_index: int | None = 0) -> bytes:
    """The end of what `texts` says."""
    place = {"item_id": item_id, "output_index": output_index, "content_index": 0}
    text = "".join(f"{n}x" for n in range(8)) + tail
    return f"data: {json.dumps({'type': 'response.output_text.done', **place, 'text': text})}\n\n".encode()


def native_of(**others: Any) -> dict[str, Any]:
    return {"output": {"choices": [{"message": {"content": TEXT}, "finish_reason": "null"}], **others}}


CITED: dict[str, Any] = {"choices": [{"delta": {"content": TEXT, "annotations": [SOURCE]}}]}
CHAT, RESPONSES, DASHSCOPE = (texts(api) for api in APIS)
NOT_QUITE = {
    "chat, an id that comes late": [*texts("chat", id=""), *texts("chat", id="late")],
    "dashscope, an id that comes late": [*texts("dashscope", request_id=""), *texts("dashscope", request_id="late")],
    "dashscope, JSON in a string": [*DASHSCOPE, *texts("dashscope", '[{"text": "hi', first=8)],
    "dashscope, speech beside text": texts("dashscope", **native_of(audio={"data": "AAAA"})),
    "chat, sources beside text": texts("chat", **CITED),
    "chat, pings by type": texts("chat", type="ping"),
    "chat, pings by name": [b"event: ping\n" + event for event in CHAT],
    "chat, lines that end in CR": [b"event: ping\r\n" + event for event in CHAT],
    "responses, two places": texts("responses", part={"item_id": "other"}),
    "responses, behind the end": [*RESPONSES, ENDS["responses"], *RESPONSES],
    "dashscope, behind the end": [*DASHSCOPE, ENDS["dashscope"], *DASHSCOPE],
    "responses, another place": [
        b'data: {"type":"response.output_item.added","item":{"type":"message","id":"msg_1"}}\n\n',
        b'data: {"type":"response.output_item.added","item":{"type":"message","id":"msg_2"}}\n\n',
        *texts("responses", output_index=None),
        *texts("responses", *"abcdefgh", output_index=None, item_id="msg_2"),
        said("msg_1", " and more", output_index=None),
    ],
    "dashscope, a count that few parsers take": [
        *texts("dashscope", usage={"total_tokens": 5}),
        *texts("dashscope", usage={"total_tokens": 10**400}),
    ],
    "chat, a time that no parser takes": [
        *CHAT,
        *[event.replace(b'"created":', b'"created":' + b"9" * 5000) for event in CHAT],
    ],
    "chat, a twin": [event.replace(b'"content":"', b'"content":"twin","content":"') for event in CHAT],
    "chat, a twin in disguise": [
        event.replace(b'"logprobs"', b'"x":0},"delta":{"c\\u006fntent":"twin"},"logprobs"') for event in CHAT
    ],
    "chat, a blank before a colon": [
        event.replace(b'"content":', b'"content" :') for event in texts("chat", *["the same"] * 8)
    ],
    "chat, usage that grows": [chat(f"{n}x", n, usage={"completion_tokens": n}) for n in range(8)],
    "dashscope, texts that grow": texts("dashscope", *["x" * n for n in range(1, 9)]),
    "chat, another text, and a blank before a colon": [
        b'data: {"x":{"content":"%d"},"choices":[{"delta":{"content" :"B"}}]}\n\n' % n for n in range(8)
    ],
}


@pytest.mark.parametrize("name", NOT_QUITE)
@pytest.mark.parametrize("model", ["qwen", "kimi"])
@pytest.mark.parametrize("end", [True, False])
def test_what_is_not_quite_alike_is_parsed(name: str, model: str, *, end: bool) -> None:
    api = name.split(",", maxsplit=1)[0]
    taken = [*NOT_QUITE[name], *([ENDS[api]] if end else [])]
    parsed = Outcome(APIS[api].decoder(model), *taken, parses_all=True)
    assert Outcome(APIS[api].decoder(model), *taken) == parsed


@pytest.mark.parametrize("api", APIS)
def test_usage_may_be_asked_for_at_any_time(api: str) -> None:
    decoder, deltas = APIS[api].decoder("qwen"), list[Any]()
    for packet in (*texts(api), *([said("msg_1", " and more")] if api == "responses" else [])):
        if alike := decoder.read_alike(packet):
            deltas += alike
        else:
            decoder.feed(packet)
            deltas += iter(decoder.next_delta, None)
        assert (decoder.usage is None) == (api != "dashscope")
    taken = [*texts(api), *([said("msg_1", " and more")] if api == "responses" else [])]
    assert deltas == Outcome(APIS[api].decoder("qwen"), *taken, parses_all=True).deltas


@pytest.mark.parametrize("other", [b": keep-alive\n\n", b'data: {"type":"response.web_search_call.searching"}\n\n'])
def test_events_that_no_other_could_be_like_are_not_counted(other: bytes) -> None:
    decoder, read = APIS["responses"].decoder("qwen"), 0
    for packet in (*[other] * 50, *texts("responses", *map(str, range(100)))):
        read += len(deltas := decoder.read_alike(packet))
        if not deltas:
            decoder.feed(packet)
            while decoder.next_delta() is not None:
                pass
    assert read >= 97


def test_of_events_that_are_long_beside_their_text_no_pattern_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_alike, "_PATTERNS", _alike._Patterns())
    events = texts("chat", *["x" * 5000] * 9, citations=["https://example.org"] * 100)
    assert len(Outcome(APIS["chat"].decoder("qwen"), *events).deltas) == 9
    assert not _alike._PATTERNS._found


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("size", [1, 20])
def test_most_events_are_not_parsed(api: str, size: int) -> None:
    events = [SAYS[api](f'a "{n}"\n世', n) for n in range(100)]
    decoder, read = APIS[api].decoder("qwen"), 0
    for at in range(0, 100, size):
        packet = b"".join(events[at : at + size])
        if deltas := decoder.read_alike(packet):
            read += len(deltas)
            continue
        decoder.feed(packet)
        while decoder.next_delta() is not None:
            pass
    assert read >= 100 - 3 * size
    assert decoder.frames == 100


@pytest.mark.parametrize("api", APIS)
def test_what_the_next_one_may_differ_in_is_the_same_for_all_streams(api: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_alike, "_PATTERNS", _alike._Patterns())
    for stream in ("one", "two", "three"):
        names = {"id": stream, "request_id": stream, "item_id": stream}
        names = {name: value for name, value in names.items() if f'"{name}"'.encode() in SAYS[api]("", 0)}
        events = [SAYS[api](f"{n}x", n, **names) for n in range(9)]
        assert Outcome(APIS[api].decoder("qwen"), *events).deltas[-1] == ("content", b"8x")
    assert len(_alike._PATTERNS._found) == 1


def test_where_each_event_is_another_none_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_alike, "_PATTERNS", _alike._Patterns())
    events = [chat("x", n, offset=n) for n in range(100)]
    assert len(Outcome(APIS["chat"].decoder("qwen"), *events).deltas) == 100
    assert 0 < len(_alike._PATTERNS._found) < 20, "it gives up"
    assert not any(_alike._PATTERNS._found.values())


def test_patterns_are_forgotten_when_there_are_too_many() -> None:
    patterns = _alike._Patterns()
    for n in range(10_000):
        patterns.match_of(b"%d" % n)
    assert len(patterns._found) <= 256


def test_the_last_usage_counts_of_events_that_were_not_parsed() -> None:
    events = [dashscope(f"{n}x", n) for n in range(50)]
    outcome = Outcome(APIS["dashscope"].decoder("qwen"), *events)
    assert outcome.usage is not None
    assert outcome.usage["output_tokens"] == 49


def test_of_a_background_response_each_event_is_parsed_as_its_number_is_wanted() -> None:
    decoder = BackgroundDecoder(lambda _id: None)
    Outcome(decoder, *[responses(f"{n}x", n, "content") for n in range(20)])
    assert decoder.last_event == 19


def test_a_text_that_comes_whole_is_not_said_again_when_its_deltas_were_not_parsed() -> None:
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    texts = [f"word {n}, " for n in range(30)]
    events = [responses(text, n, "content") for n, text in enumerate(texts)]
    done = json.dumps({"type": "response.output_text.done", **place, "text": "".join(texts)})
    outcome = Outcome(APIS["responses"].decoder("qwen"), *events, f"data: {done}\n\n".encode())
    assert b"".join(data for _, data in outcome.deltas) == "".join(texts).encode()
