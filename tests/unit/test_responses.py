"""Responses decoding. The numbered tests are the oddities of real servers that break naive parsers."""

import json
import re
import sys
import tracemalloc
from collections.abc import Mapping
from types import FrameType
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltafan_worker import _said
from deltafan_worker._plain import whole_characters
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


def test_parts_of_which_only_the_end_is_sent() -> None:
    place = {"output_index": 0, "item_id": "rs"}
    pieces = [
        event("response.reasoning_summary_text.done", text=words, summary_index=n, **place)
        for n, words in enumerate(["First.", "Second.", "First."])
    ]
    item = {"type": "reasoning", "id": "rs", "summary": [{"text": words} for words in ("First.", "Second.", "First.")]}
    for end in ([event("response.output_item.done", output_index=0, item=item), completed()], [completed(item)]):
        assert decode(*pieces, *end).generation.reasoning == "First.\n\nSecond.\n\nFirst."
    items = [{"type": "reasoning", "id": id_, "content": [{"text": id_}]} for id_ in ("One.", "Two.")]
    assert decode(completed(*items)).generation.reasoning == "One.\n\nTwo."
    texts = [event("response.output_text.done", text=words, content_index=n) for n, words in enumerate(["He", "y"])]
    assert decode(*texts, *texts, completed()).generation.content == "Hey"


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


def test_encrypted_reasoning_of_the_final_object_is_kept_with_its_call() -> None:
    thoughts = [{"type": "reasoning", "id": f"rs_{n}", "summary": [], "encrypted_content": f"gAA{n}"} for n in (1, 2)]
    told = event("response.output_item.done", output_index=0, item=thoughts[0])
    first, second = call_item(arguments="{}"), call_item(id="fc_2", call_id="call_2", arguments="{}")
    outcome = decode(
        told,
        event("response.output_item.done", output_index=1, item=first),
        completed(thoughts[0], first, thoughts[1], second),
    )
    assert [call.extra for call in outcome.generation.tool_calls] == [
        {"reasoning": [thoughts[0]]},
        {"reasoning": [thoughts[1]]},
    ]


def message(*parts: str, **fields: Any) -> dict[str, Any]:
    """A message whole; its id is the first of its texts."""
    content = [{"type": "output_text", "text": words} for words in parts]
    return {"type": "message", "id": parts[0], "content": content, **fields}


def test_what_only_the_final_object_holds_is_published_behind_the_rest_and_in_its_order() -> None:
    thought = {"type": "reasoning", "id": "rs", "summary": [{"text": "Hm."}, {"text": "So."}]}
    refusal = {"type": "message", "id": "msg_2", "content": [{"type": "refusal", "refusal": "No."}]}
    outcome = decode(
        text("banana"),
        completed(
            message("banana", "na", id="msg_1"),
            thought,
            message("ban"),
            call_item(arguments="{}"),
            refusal,
            message("an"),
        ),
    )
    assert [(kind, data) for kind, data in outcome.deltas if kind != "tool_call"] == [
        ("content", b"banana"),
        ("content", b"na"),
        ("reasoning", b"Hm."),
        ("reasoning", b"\n\n"),
        ("reasoning", b"So."),
        ("content", b"ban"),
        ("refusal", b"No."),
        ("content", b"an"),
    ]
    assert [kind for kind, _ in outcome.deltas].index("tool_call") == 6
    assert (outcome.calls, outcome.finish) == ([("call_1", "f", "{}")], "tool_calls")


def test_an_incomplete_object_is_read_as_well() -> None:
    response = {"status": "incomplete", "output": [message("Hey"), message("Yo")]}
    end = event("response.incomplete", response={**response, "incomplete_details": {"reason": "max_output_tokens"}})
    outcome = decode(text("Hey", item_id="Hey"), end)
    assert (outcome.generation.content, outcome.finish) == ("HeyYo", "length")


def test_a_text_that_comes_whole_brings_its_sources() -> None:
    sources = [{"type": "url_citation", "url": f"http://{host}"} for host in "ab"]
    parts = [{"type": "output_text", "text": "Hey", "annotations": sources}]
    told = event("response.output_text.annotation.added", annotation=sources[0])
    assert [kind for kind, _ in decode(told, completed(message("Hey", content=parts))).deltas] == [
        "annotation",
        "content",
        "annotation",
    ]
    assert [kind for kind, _ in decode(told, text("Hey"), completed(message("Hey", content=parts))).deltas] == [
        "annotation",
        "content",
        "annotation",
    ], "also where its deltas came without them"
    other_order = [dict(reversed(source.items())) for source in sources]
    again = completed(message("Hey", content=[{**parts[0], "annotations": other_order}]))
    assert [json.loads(data) for kind, data in decode(told, again).deltas if kind == "annotation"] == sources


NAMELESS = {"item_id": None, "output_index": None, "content_index": None}


@pytest.mark.parametrize(
    "place",
    [
        NAMELESS,
        {"item_id": None, "output_index": 7},
        {"item_id": "other", "output_index": None},
        {"item_id": "other", "output_index": 7},
        {"content_index": None},
    ],
    ids=["nameless", "another index", "another id", "both", "without content_index"],
)
@pytest.mark.parametrize("said", ["Hey", "Hey\n", "He"])
def test_what_may_have_been_said_is_not_said_again(place: dict[str, Any], said: str) -> None:
    item = message("Hey", id="msg_1")
    done = event("response.output_text.done", text="Hey", **{**NAMELESS, **place})
    for end in ([done], [event("response.output_item.done", output_index=0, item=item)], []):
        outcome = decode(text(said, **place), *end, completed(item, message("Yo")))
        assert outcome.generation.content == ("Hey" if said == "He" else said) + "Yo", "but for its tail"


def test_the_end_of_a_text_may_leave_out_where_it_belongs_or_name_it_otherwise() -> None:
    added = event("response.output_item.added", output_index=0, item=message("Hey", content=[]))
    for begun in ([], [added]):
        for place in ({}, {"content_index": 0}, {"item_id": "other"}, {"output_index": 7}):
            done = event("response.output_text.done", text="Hey", **place)
            assert decode(*begun, text("Hey", item_id="Hey"), done, completed()).generation.content == "Hey"
    assert (
        decode(text("Hey", **NAMELESS), event("response.output_text.done", text="Hay"), completed()).generation.content
        == "Hey"
    )


def test_what_has_an_index_and_no_id_that_holds_is_found_by_its_index() -> None:
    for place in ({"item_id": None}, {"item_id": "other"}):
        outcome = decode(text("Hey", **place), completed(message("Hay"), message("Yo")))
        assert outcome.generation.content == "HeyYo", "whatever became of its words"


def test_places_in_the_final_object_need_not_be_the_indexes_of_items_with_ids() -> None:
    for said in ("Hey", "He"):
        told = text(said, item_id="Hey", output_index=1)
        assert decode(told, completed(message("Hey"), message("Yo"))).generation.content == "HeyYo"


def test_reasoning_that_was_shown_is_not_shown_in_its_other_form() -> None:
    for shown in ("summary", "content"):
        item = {"type": "reasoning", "id": "rs", "content": [], "summary": [{"text": "In"}, {"text": "short"}]}
        if shown == "summary":
            item |= {"content": [{"text": "At"}, {"text": "length"}]}
        kind = "response.reasoning_text" if shown == "content" else "response.reasoning_summary_text"
        told = event(f"{kind}.delta", delta="Hm.", output_index=0, item_id="rs", **{f"{shown}_index": 0})
        assert decode(told, completed(item)).generation.reasoning == "Hm."


@pytest.mark.parametrize("begins", [False, True])
def test_parts_that_are_all_numbered_0_are_not_said_again(begins: bool) -> None:
    texts = [{"type": "text", "text": words} for words in ("Hello ", "World", "!")]
    seen = {"type": "reasoning_text", "text": "Hm."}
    for name, item in (
        ("response.output_text", {"type": "message", "content": texts}),
        ("response.output_text", {"type": "message", "content": [seen, *texts]}),
        ("response.output_text", {"type": "message", "content": [seen, {"type": "text", "text": "Hello World! "}]}),
        ("response.reasoning_text", {"type": "reasoning", "content": texts}),
        ("response.reasoning_summary_text", {"type": "reasoning", "summary": texts}),
    ):
        place = {"item_id": "i", "output_index": 0, "content_index": 0, "summary_index": 0}
        said = [event(f"{name}.delta", delta=piece, **place) for piece in ("Hello ", "World", "!")]
        added, done = (
            event(f"response.output_item.{step}", output_index=0, item={"id": "i", **item})
            for step in ("added", "done")
        )
        generation = decode(*[added][: int(begins)], *said, done, completed({"id": "i", **item})).generation
        assert generation.content + generation.reasoning == "Hello World!"


def test_reasoning_that_is_sent_in_both_its_forms_is_shown_in_the_first() -> None:
    place = {"output_index": 0, "item_id": "rs", "content_index": 0, "summary_index": 0}
    pieces = [
        event(f"response.{form}.delta", delta=piece, **place)
        for piece in ("The", " user")
        for form in ("reasoning_summary_text", "reasoning_text")
    ]
    assert decode(*pieces, completed()).generation.reasoning == "The user"
    nameless = [
        event(f"response.{form}.delta", delta=form[:13]) for form in ("reasoning_summary_text", "reasoning_text")
    ]
    assert len(decode(*nameless, completed()).deltas) == 3, "of items without names nobody knows"


@pytest.mark.parametrize("name", ["reasoning_text", "reasoning_summary_text"])
def test_what_several_items_reason_is_paragraphs(name: str) -> None:
    pieces = [
        event(f"response.{name}.delta", delta=piece, output_index=n, summary_index=0, content_index=0, item_id=f"{n}")
        for n, piece in enumerate(["One", "Two"])
        for piece in (piece, ".")
    ]
    assert decode(*pieces, completed()).generation.reasoning == "One.\n\nTwo."


def test_a_text_that_the_final_object_tidies_up_is_the_same_one() -> None:
    thought = event("response.reasoning_text.delta", delta="Hm.", output_index=0, item_id="rs")
    told = text("a  b\n", item_id="old", output_index=1)
    assert decode(thought, told, completed(message("a b", "c", id="new"))).generation.content == "a  b\nc"


def test_numbers_that_are_none_and_items_that_are_none() -> None:
    odd = [text("He", content_index=[]), text("y", content_index=[])]
    assert decode(*odd, event("response.output_text.done", text="Hey", content_index=0)).generation.content == "Hey"
    told = text("Hey", item_id=None, output_index=1)
    assert decode(told, completed(None, message("Hay"))).generation.content == "Hey", "an item keeps its place"


def work(*pieces: bytes) -> int:
    """Calls and bytes searched while a stream is decoded."""
    done = 0

    def count(_frame: FrameType, happening: str, what: Any) -> None:
        nonlocal done
        if happening in ("call", "c_call"):
            done += 1
            if getattr(what, "__name__", "") in ("find", "count"):
                done += len(what.__self__)

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        decode(*pieces)
    finally:
        sys.setprofile(before)
    return done


def in_many_items(shape: str, items: int) -> list[bytes]:
    """A stream of so many items and its final object, named in one of the ways that make them hard to tell apart."""
    words = [f"text of number {n}. " * 5 for n in range(items)]
    told = [text(one, item_id=f"m{n}", output_index=None, content_index=None) for n, one in enumerate(words)]
    calls = [call_item(id=one, call_id=one, arguments=f'{{"a":{n}}}') for n, one in enumerate(words)]
    ended = [event("response.output_item.done", item=item) for item in calls]
    match shape:
        case "renamed":
            return [*told, completed(*map(message, words))]
        case "renamed in another order":
            return [*told, completed(*map(message, words[::-1]))]
        case "other texts":
            return [*told, completed(*(message(f"other {one}") for one in words))]
        case "only their ends":
            return [event("response.output_item.done", item=message(one)) for one in words]
        case "parts":
            place = {"item_id": "m", "output_index": 0}
            return [
                event("response.output_text.done", text=one, content_index=n, **place) for n, one in enumerate(words)
            ]
        case "parts without numbers":
            return [text("".join(words), content_index=None), completed(message(*words[::-1], "new", id="msg_1"))]
        case "parts of the final object":
            return [completed(message(*words))]
        case _:
            return [*ended, completed(*({**item, "id": None, "call_id": f"{n}"} for n, item in enumerate(calls[::-1])))]


@pytest.mark.parametrize(
    "shape",
    [
        "renamed",
        "renamed in another order",
        "other texts",
        "only their ends",
        "parts",
        "parts without numbers",
        "parts of the final object",
        "calls renamed in another order",
    ],
)
def test_many_items_take_work_in_step_with_their_number(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_said, "SEARCHED_BYTES", 1_000)
    few, many = (work(*in_many_items(shape, items)) for items in (100, 400))
    assert many < 5 * few, "16 times would be quadratic"


def test_renamed_texts_are_found_in_their_order_however_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_said, "SEARCHED_BYTES", 200_000)
    left_out = text("what the final object leaves out", item_id="m", output_index=None)
    assert len(decode(left_out, *in_many_items("renamed", 800)).deltas) == 801
    monkeypatch.setattr(_said, "SEARCHED_BYTES", 1)
    ends = [done(message(words)) for words in ("Yo", "Hey")]
    assert decode(text("Hey", **NAMELESS), *ends, completed()).generation.content == "HeyYo"


def test_parts_are_told_from_what_their_own_item_and_others_said() -> None:
    place = {"item_id": "m", "output_index": 0}
    first = event("response.output_text.done", text="a", content_index=0, **place)
    longer = event("response.output_text.done", text="banana", content_index=1, **place)
    item = message("a", "banana", id="m")
    for end in (longer, event("response.output_item.done", output_index=0, item=item)):
        assert decode(first, end, completed()).generation.content == "abanana"
    inside = event("response.output_text.done", text="na", content_index=1, **place)
    assert decode(text("banana", item_id="m"), inside, completed()).generation.content == "bananana", "numbers tell"
    told = [text(one, item_id=f"m{n}", output_index=n, content_index=at) for n, at, one in ((1, 0, "A"), (2, 0, "B"))]
    told.append(text("C", item_id="m2", output_index=2, content_index=1))
    assert decode(*told, completed(message("A"), message("B", "C"))).generation.content == "ABC", "places are shifted"
    one = text("HeyYo!", content_index=None)
    assert decode(one, completed(message("Hey", "Yo", id="msg_1"))).generation.content == "HeyYo!", "without numbers"
    assert decode(completed(message(" "))).generation.content == " "
    refusal = {"type": "refusal", "refusal": "No."}
    mixed = message("-", id="msg_1", content=[refusal, {"type": "output_text", "text": "Hey"}])
    generation = decode(text("Ha"), completed(mixed)).generation
    assert (generation.content, generation.refusal) == ("Ha", "No."), (
        "an only text of its kind is the one that was said"
    )


def test_what_was_said_is_kept_in_little_more_than_its_size() -> None:
    decoder, pieces = ResponsesDecoder(), [text(f" word{n}", content_index=n) for n in range(5_000)]
    tracemalloc.start()
    for piece in pieces:
        decoder.feed(piece)
        assert decoder.next_delta() is not None
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 3 * 5_000 * len(" word1234")


def test_an_item_at_the_index_of_another_is_another_one() -> None:
    stream = [
        event("response.output_item.added", output_index=0, item=message("Hey", content=[])),
        text("Hey", item_id="Hey"),
        event("response.output_item.added", output_index=0, item=message("He", content=[])),
    ]
    done = event("response.output_item.done", output_index=0, item=message("He"))
    for end in (
        [done, completed()],
        [completed(message("Hey"), message("He"))],
        [completed(message("He"), message("Hey"))],
    ):
        assert decode(*stream, *end).generation.content == "HeyHe"
    first = event("response.output_item.done", output_index=1, item=message("Hay"))
    begun = [
        event("response.output_item.added", output_index=index, item=message(words, content=[]))
        for index, words in enumerate(["Hay", "Hey"])
    ]
    assert decode(*begun, text("Hey", item_id="Hey", output_index=1), first, completed()).generation.content == "HeyHay"
    again = [stream[0], stream[1], stream[0], event("response.output_item.done", output_index=0, item=message("Hey"))]
    assert decode(*again, completed()).generation.content == "Hey", "and one that begins twice is one"


@pytest.mark.parametrize(
    "names", [{"id": "fc_9", "call_id": "call_9"}, {"call_id": None}, {"id": None, "call_id": None}]
)
def test_a_call_that_the_final_object_names_otherwise_is_the_same_one(names: dict[str, Any]) -> None:
    whole, added = call_item(arguments='{"a":1}'), event("response.output_item.added", output_index=3, item=call_item())
    told = event("response.function_call_arguments.done", output_index=3, arguments='{"a":1}')
    new = call_item(id="fc_2", call_id="call_2", arguments='{"b":2}')
    assert decode(added, told, completed(new, {**whole, **names})).calls == [
        ("call_1", "f", '{"a":1}'),
        ("call_2", "f", '{"b":2}'),
    ]
    assert decode(added, completed({**whole, **names})).calls == [("call_1", "f", '{"a":1}')]


@pytest.mark.parametrize("names", [{}, {"id": "fc_9", "call_id": "call_9"}, {"call_id": None}])
@pytest.mark.parametrize("arguments", ['{"b":"\u00e9","a":1}', '{"a": 1, "b": "\\u00e9"}', {"a": 1, "b": "\u00e9"}])
def test_a_call_whose_arguments_the_final_object_writes_otherwise_is_the_same_one(
    names: dict[str, Any], arguments: Any
) -> None:
    told = event("response.output_item.done", output_index=0, item=call_item(arguments='{"a":1,"b":"\u00e9"}'))
    final = completed(call_item(arguments=arguments, **names), call_item(id="2", call_id="2", arguments='{"a":2}'))
    assert [arguments for *_, arguments in decode(told, final).calls] == ['{"a":1,"b":"\u00e9"}', '{"a":2}']


def test_calls_that_the_final_object_renames_keep_their_order() -> None:
    names = [{"id": f"fc_{n}", "call_id": f"call_{n}"} for n in (1, 2)]
    added = [
        event("response.output_item.added", output_index=n, item=call_item(**name)) for n, name in enumerate(names)
    ]
    whole = [call_item(id=f"x{n}", call_id=f"y{n}", arguments=f"[{n}]") for n in (1, 2)]
    assert decode(*added, completed(*whole)).calls == [("call_1", "f", "[1]"), ("call_2", "f", "[2]")]


def test_a_call_without_a_call_id_is_known_by_the_id_of_its_item() -> None:
    two = [call_item(call_id=f"call_{n}", arguments=f"[{n}]") for n in (1, 2)]
    assert len(decode(completed(*two)).calls) == 2, "and by its call_id where it has one"
    told = event("response.output_item.done", output_index=0, item=call_item(arguments="half"))
    assert decode(told, completed(call_item(call_id=None, arguments="whole"))).calls == [("call_1", "f", "half")]


def test_calls_without_any_id_are_told_apart_by_name_and_arguments() -> None:
    bare = {"type": "function_call", "name": "f", "arguments": "{}"}
    told = event("response.output_item.done", output_index=0, item=bare)
    other, longer = {**bare, "name": "g"}, {**bare, "arguments": '{"a":1}'}
    final = completed(longer, other, bare, bare)
    assert [(name, arguments) for _, name, arguments in decode(told, final).calls] == [
        ("f", "{}"),
        ("f", '{"a":1}'),
        ("g", "{}"),
        ("f", "{}"),
    ]


def added(item: Mapping[str, Any], **place: Any) -> bytes:
    return event("response.output_item.added", item=item, **place)


def done(item: Mapping[str, Any], **place: Any) -> bytes:
    return event("response.output_item.done", item=item, **place)


def pieces(*fragments: str, **place: Any) -> list[bytes]:
    return [event("response.function_call_arguments.delta", delta=fragment, **place) for fragment in fragments]


WRAPPED = '{"tool_uses":[{"recipient_name":"functions.a","parameters":{}},{"recipient_name":"b","parameters":{}}]}'


@pytest.mark.parametrize(
    "begun", [{"call_id": "other"}, {"call_id": None}, {"call_id": None, "id": None}, {"name": ""}]
)
@pytest.mark.parametrize("ended", [{}, {"id": None}, {"id": "fc_2"}, {"arguments": ' {"a" : 1}'}])
def test_a_call_whose_call_id_is_another_at_its_end_is_called_once(
    begun: dict[str, Any], ended: dict[str, Any]
) -> None:
    whole = call_item(arguments='{"a":1}')
    for final in ([], [whole], [{**whole, "id": "fc_3", "call_id": "call_3"}], [{**whole, "call_id": None}]):
        calls = decode(
            added(call_item(**begun), output_index=1),
            *pieces('{"a":', "1}", output_index=1, item_id="fc_1"),
            event("response.function_call_arguments.done", arguments='{"a":1}', output_index=1, item_id="fc_1"),
            done({**whole, **ended}, output_index=1),
            completed(*final),
        ).calls
        assert [(bool(call_id), *call) for call_id, *call in calls] == [(True, "f", '{"a":1}')]
    wrapper = decode(
        added(call_item(**{**begun, "name": "parallel"}), output_index=1),
        *pieces(WRAPPED, output_index=1, item_id="fc_1"),
        done(call_item(**{**ended, "name": "parallel", "arguments": WRAPPED}), output_index=1),
        completed(),
    )
    assert [name for _, name, _ in wrapper.calls] == ["a", "b"]


def test_a_call_at_the_place_of_another_is_another_one() -> None:
    first, second = call_item(arguments='{"a":1}'), call_item(id=None, call_id="call_2", arguments='{"a":2}')
    told = [added(call_item(), output_index=0), *pieces('{"a":1}', output_index=0)]
    for other in (second, {**second, "arguments": "{}"}, {**second, "arguments": '{"a":1}', "name": "g"}):
        assert len(decode(*told, done(other, output_index=0), completed()).calls) == 2
    ended = [*told, done(first, output_index=0)]
    assert len(decode(*ended, done({**second, "arguments": '{"a":1}'}, output_index=0), completed()).calls) == 2
    final = completed({**first, "call_id": "call_3"}, {**first, "id": "fc_4", "call_id": "call_4"})
    assert len(decode(*told, final).calls) == 2, "and what was taken for one is not taken for another"


def test_a_wrapper_whose_end_is_longer_than_its_arguments_is_unwrapped_once() -> None:
    begun, place = call_item(name="parallel", call_id=None, id=None), {"output_index": 0}
    whole = event("response.function_call_arguments.done", arguments=WRAPPED, **place)
    for names in ({}, {"call_id": "call_1"}):
        outcome = decode(
            added(begun, output_index=0),
            whole,
            done({**begun, **names, "arguments": WRAPPED + " "}, output_index=0),
            completed(),
        )
        assert [json.loads(data)["index"] for _, data in outcome.deltas] == [0, 1]


def test_arguments_of_which_only_the_end_brings_the_tail() -> None:
    place = {"output_index": 0, "item_id": "fc_1"}
    told = [added(call_item(), output_index=0), *pieces('{"a":', **place)]
    end = event("response.function_call_arguments.done", arguments='{"a":1}', **place)
    early = event("response.function_call_arguments.done", arguments='{"a":', **place)
    item = call_item(arguments='{"a":1}')
    for ends in ([end], [done(item, output_index=0)], [early, done(item, output_index=0)], [completed(item)]):
        assert decode(*told, *ends, completed(item)).calls == [("call_1", "f", '{"a":1}')]
    other = decode(*told, done(call_item(arguments='{"b":1}'), output_index=0), completed())
    assert other.calls == [("call_1", "f", '{"a":')], "what does not begin with it is no tail of it"


TWO = [call_item(id="a", call_id="ca", arguments='{"a":1}'), call_item(id="b", call_id="cb", arguments='{"b":2}')]
BARE = [{**item, "arguments": ""} for item in TWO]
IDLESS = [{**item, "id": None} for item in BARE]


@pytest.mark.parametrize(
    "stream",
    [
        [
            *(added(item, output_index=0) for item in BARE),
            *pieces('{"a":', output_index=0, item_id="a"),
            *pieces('{"b":2}', output_index=0, item_id="b"),
            *pieces("1}", output_index=0, item_id="a"),
        ],
        [
            *(added(item, output_index=n) for n, item in enumerate(BARE)),
            *pieces('{"a":1}', output_index=0),
            done(TWO[0], output_index=1),
            *pieces('{"b":2}', output_index=1),
        ],
        [
            added(BARE[0], output_index=0),
            *pieces('{"b":', output_index=1, item_id="b"),
            *pieces('{"a":1}', output_index=0, item_id="a"),
            added(BARE[1], output_index=1),
        ],
        [
            added(BARE[0]),
            event("response.function_call_arguments.done", arguments='{"b":2}', item_id="b"),
            *pieces('{"a":1}', item_id="a"),
        ],
        [
            *map(added, IDLESS),
            *pieces('{"a":', item_id="ca"),
            *pieces('{"b":2}', item_id="cb"),
            *pieces("1}", item_id="ca"),
        ],
        [*map(added, IDLESS), *pieces('{"b":2}')],
        [added(IDLESS[0], output_index=0), *pieces('{"a":1}', item_id="fc_7"), *map(done, TWO)],
        [
            added({**BARE[0], "name": "f"}, output_index=0),
            done({**BARE[0], "id": "x", "arguments": '{"a":1}'}, output_index=1),
            *pieces('{"b":2}', output_index=1, item_id="b"),
        ],
    ],
    ids=[
        "one index",
        "renumbered at the end",
        "before it began",
        "before it began, without an index",
        "item_id is the call_id",
        "no place",
        "a name of another kind",
        "at the index of one that ended",
    ],
)
def test_arguments_go_to_their_own_call(stream: list[bytes]) -> None:
    for end in (completed(*TWO), b"".join(map(done, TWO)) + completed()):
        assert decode(*stream, end).calls == [("ca", "f", '{"a":1}'), ("cb", "f", '{"b":2}')]


def test_arguments_that_come_whole_at_first_may_be_spelled_out_again() -> None:
    place = {"output_index": 0, "item_id": "fc_1"}
    whole, ends = call_item(arguments='{"a":1}'), event("response.function_call_arguments.done", arguments="", **place)
    for spelled in ([], ['{"a":1}'], ['{"a"', ":1}"], ['{"a"']):
        for end in ([], [ends], [done(whole, output_index=0)]):
            outcome = decode(added(whole, output_index=0), *pieces(*spelled, **place), *end, completed())
            assert outcome.calls == [("call_1", "f", '{"a":1}')]
    for begun, rest in (('{"a"', ":1}"), ("{}", '{"a":1}')):
        outcome = decode(added({**whole, "arguments": begun}, output_index=0), *pieces(rest, **place), completed())
        assert outcome.calls == [("call_1", "f", '{"a":1}')], "or be begun, or stand for nothing"


def test_a_call_that_begins_behind_the_end_of_another_is_another_one_whatever_its_call_id() -> None:
    stream = []
    for n, item in enumerate(TWO):
        place = {"output_index": n, "item_id": item["id"]}
        begun = {**item, "call_id": "call_1", "arguments": ""}
        stream += [added(begun, output_index=n), *pieces(item["arguments"], **place)]
        stream.append(done({**item, "call_id": "call_1"}, output_index=n))
    assert [arguments for *_, arguments in decode(*stream, completed()).calls] == ['{"a":1}', '{"b":2}']
    assert len(decode(*stream, stream[-3], completed()).calls) == 2, "but one that begins twice is one"


def test_pieces_for_a_call_that_ended_without_arguments_are_another_ones() -> None:
    ended = [added(BARE[0], output_index=0), done(BARE[0], output_index=1)]
    told = [*ended, *pieces('{"b":2}', output_index=1, item_id="b"), done(TWO[1], output_index=2)]
    assert decode(*told, completed()).calls == [("ca", "f", "{}"), ("cb", "f", '{"b":2}')]


@pytest.mark.parametrize("place", [{"output_index": 0, "item_id": "fc_1"}, {"output_index": 0}, {"item_id": "fc_1"}])
def test_a_call_whose_first_pieces_came_before_it_began_has_its_arguments_from_its_end(place: dict[str, Any]) -> None:
    early, late = pieces('{"a":', "1}", **place)
    whole = event("response.function_call_arguments.done", arguments='{"a":1}', **place)
    item, begun = call_item(arguments='{"a":1}'), added(call_item(), output_index=0)
    for end in ([whole, completed()], [done(item, output_index=0), completed()], [completed(item)]):
        assert decode(early, begun, late, *end).calls == [("call_1", "f", '{"a":1}')]
    assert decode(early, begun, late, completed()).calls == [("call_1", "f", "{}")], "no piece makes a whole"
    (empty,) = pieces("", **place)
    assert decode(empty, begun, early, late, completed()).calls == [("call_1", "f", '{"a":1}')]
    second = [added(call_item(id="fc_1", call_id="call_2"), output_index=0), *pieces("[2]", **place)]
    told = [early, begun, done(item, output_index=0), *second, completed()]
    assert decode(*told).calls == [("call_1", "f", '{"a":1}'), ("call_2", "f", "[2]")], "the next one has its own"


def test_places_of_early_pieces_are_noted_in_bounded_memory() -> None:
    decoder, told = ResponsesDecoder(), [pieces("x", item_id=f"{n}")[0] for n in range(5_000)]
    tracemalloc.start()
    for piece in told:
        decoder.feed(piece)
        assert decoder.next_delta() is None
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 100 * 5_000


def test_arguments_behind_their_end_repeat_them() -> None:
    place = {"output_index": 0, "item_id": "fc_1"}
    whole = event("response.function_call_arguments.done", arguments='{"a":1}', **place)
    for end in (whole, done(call_item(arguments='{"a":1}'), output_index=0)):
        outcome = decode(added(call_item(), output_index=0), end, *pieces('{"a":', "1}", **place), completed())
        assert outcome.calls == [("call_1", "f", '{"a":1}')]


@pytest.mark.parametrize("empty", ["", None, True])
def test_an_empty_id_names_nothing(empty: Any) -> None:
    stream = []
    for index, words in enumerate(["One.", "Two."]):
        item = message(words, id=empty)
        stream += [
            added({**item, "content": []}, output_index=index),
            text(words, item_id=empty, output_index=index),
            done(item, output_index=index),
        ]
    calls = [call_item(id=empty, call_id=empty, arguments=f"[{n}]") for n in (1, 2)]
    stream += [done(call, output_index=index) for index, call in enumerate(calls, 2)]
    outcome = decode(*stream, completed(message("One.", id=empty), message("Two.", id=empty), *calls))
    assert outcome.generation.content == "One.Two."
    assert [arguments for *_, arguments in outcome.calls] == ["[1]", "[2]"]


@pytest.mark.parametrize(
    ("said", "whole"),
    [
        (["Hello "], "Hello <"),
        (["Hello"], "Hello <"),
        (["Hello\n\n"], "Hello <"),
        (["H", "ello"], " Hello\u3000World, 😀"),
        (["世\ud83c", "\udf0d "], "世🌍 🌍"),
    ],
)
def test_a_text_of_which_only_the_end_brings_the_tail(said: list[str], whole: str) -> None:
    item, place = message(whole, id="msg_1"), {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    added_, done_ = added({**item, "content": []}, output_index=0), done(item, output_index=0)
    end = surrogates("response.output_text.done", text=whole, **place)
    for names in ({}, NAMELESS, {"item_id": "other"}, {"content_index": None}):
        told = [surrogates("response.output_text.delta", delta=piece, **{**place, **names}) for piece in said]
        for ends in ([end], [done_], [end, done_], []):
            generation = decode(added_, *told, *ends, completed(item)).generation
            assert same(generation.content, whole), (names, ends)
            assert "  " not in generation.content


def surrogates(kind: str, **fields: Any) -> bytes:
    """An event whose texts have halves of UTF-16 pairs."""
    return b"data: " + json.dumps({"type": kind, **fields}).encode() + b"\n\n"


def same(one: str, other: str) -> bool:
    """Whether two texts are the same but for white space and how pairs are written."""
    return "".join(whole_characters(one).split()) == "".join(whole_characters(other).split())


def test_a_tail_goes_on_with_what_it_ends() -> None:
    place = {"item_id": "rs", "output_index": 0}
    told = [
        event("response.reasoning_summary_text.delta", delta=words, summary_index=n, **place)
        for n, words in enumerate(["First.", "Sec"])
    ]
    item = {"type": "reasoning", "id": "rs", "summary": [{"text": "First."}, {"text": "Second."}]}
    for end in (done(item, output_index=0), b""):
        assert decode(*told, end, completed(item)).generation.reasoning == "First.\n\nSecond."
    growing = [text(piece, content_index=n) for n, piece in enumerate(["He", "llo", " y"])]
    assert decode(*growing, completed(message("Hello you", id="msg_1"))).generation.content == "Hello you"
    late = [text("Hel", item_id="a", output_index=0), text("Yo", item_id="b", output_index=1)]
    assert decode(*late, completed(message("Hello", id="a"), message("Yo", id="b"))).generation.content == "HelYolo"
    turning = [text(piece, item_id=piece, output_index=None) for piece in ("He", "y")]
    end = event("response.output_text.done", text="Hey", item_id="He", content_index=0)
    assert decode(*turning, end, completed()).generation.content == "Hey", "no tail: another item may have said it"


def test_a_text_under_the_index_of_another_item_is_published_once() -> None:
    thought = {"type": "reasoning", "id": "rs", "summary": [], "content": [{"text": "Hm."}]}
    told = [
        event("response.reasoning_text.delta", delta="Hm.", item_id="rs", output_index=0),
        text("Hey", item_id="m", output_index=0),
    ]
    renumbered = [*told[:1], done(thought, output_index=1), text("Hey", item_id="m", output_index=1)]
    only_ends = [done(thought, output_index=1), text("Hey", item_id="m", output_index=1)]
    for stream in (told, renumbered, [added({**thought, "content": []}, output_index=0), *renumbered], only_ends):
        for end in ([], [done(message("Hey", id="m"), output_index=1)]):
            generation = decode(*stream, *end, completed(thought, message("Hey", id="m"))).generation
            assert (generation.reasoning, generation.content) == ("Hm.", "Hey")


def test_a_text_that_comes_whole_at_the_index_of_another_items_is_another_one() -> None:
    told, end = text("Hi", item_id="a"), done(message("Yo", id="b"), output_index=0)
    assert decode(told, end, completed()).generation.content == "HiYo"


def test_items_that_the_final_object_renames_and_moves_are_found_where_their_texts_are() -> None:
    def thought(words: str, id_: str) -> dict[str, Any]:
        return {"type": "reasoning", "id": id_, "content": [{"text": words}]}

    told = [
        event("response.reasoning_text.delta", delta="Hm.", item_id="a", output_index=0),
        text("Hey", item_id="b", output_index=1),
    ]
    final = completed(thought("New.", "x"), thought("Hm.", "y"), message("Hey", id="z"))
    generation = decode(*told, final).generation
    assert (generation.reasoning, generation.content) == ("Hm.\n\nNew.", "Hey")


def test_items_without_ids_at_one_index_that_all_end_at_the_end() -> None:
    thought, answer = {"type": "reasoning", "content": [{"text": "Hm."}]}, message("Hey", id=None)
    stream = [
        added({**thought, "content": []}, output_index=0),
        event("response.reasoning_text.delta", delta="Hm.", output_index=0),
        added({**answer, "content": []}, output_index=0),
        text("Hey", item_id=None),
        done(thought, output_index=0),
        done(answer, output_index=0),
    ]
    for final in ([], [thought, answer]):
        generation = decode(*stream, completed(*final)).generation
        assert (generation.reasoning, generation.content) == ("Hm.", "Hey")


def test_deltas_behind_an_end_go_on() -> None:
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    whole = event("response.output_text.done", text="Hey", **place)
    for begun in ([], [text("Hey")]):
        for final in ([], [message("Hey Hey", id="msg_1")]):
            assert decode(*begun, whole, text(" Hey"), completed(*final)).generation.content == "Hey Hey"


@pytest.mark.parametrize("names", [NAMELESS, {"item_id": "old", "output_index": None}], ids=["nameless", "renamed"])
def test_texts_without_names_that_hold_are_known_by_their_words(names: dict[str, Any]) -> None:
    def told(*deltas: str) -> list[bytes]:
        return [surrogates("response.output_text.delta", delta=piece, **names) for piece in deltas]

    for deltas, whole in ((("Hi \ud83d", "\ude00!"), "Hi 😀!"), (("Hi\u00a0you",), "Hi you")):
        assert len(decode(*told(*deltas), completed(message(whole))).deltas) == len(deltas)
    longer = [message("I"), message("I have found it.")]
    for end in (completed(*longer), b"".join(map(done, longer)) + completed(*longer)):
        assert decode(*told("I"), end).generation.content == "II have found it."


def test_texts_of_items_without_names_that_only_their_ends_bring() -> None:
    told, bare = text("One.", **NAMELESS), {"id": None}
    ends = [done(message("One.", **bare)), done(message("Two.", **bare)), done(message("Three.", "Four.", **bare))]
    assert decode(told, *ends, completed()).generation.content == "One.Two.Three.Four."
    assert decode(told, ends[2], *ends[:2], completed()).generation.content == "One.Three.Four.Two."
    late = [told, text("Two", **NAMELESS)]
    parts = [event("response.output_text.done", text=words) for words in ("One.", "Two.")]
    assert decode(*late, *parts, completed()).generation.content == "One.Two."


def test_parts_with_one_number_at_one_index_are_published_once() -> None:
    stream = []
    for id_, words in (("a", ("A", "B")), ("b", ("C", "D"))):
        stream += [text(word, item_id=id_) for word in words]
        stream.append(done(message(*words, id=id_), output_index=0))
    for names in ({}, {"id": None}):
        final = completed(message("A", "B", id="a") | names, message("C", "D", id="b") | names)
        assert decode(*stream, final).generation.content == "ABCD"


def test_a_whole_text_between_others_is_found_by_its_words() -> None:
    told = [text("A", content_index=0), text("C", content_index=2)]
    item = message("A", "B", "C", id="msg_1")
    for end in ([done(item, output_index=0)], []):
        assert decode(*told, *end, completed(item)).generation.content == "ACB", "a hole between parts"
    bare = [text("A", item_id=None), text("C", item_id=None, output_index=1)]
    items = [message(words, id=None) for words in "ABC"]
    assert decode(*bare, completed(*items)).generation.content == "ACB", "a place that is another one's"


def test_texts_that_only_parts_bring() -> None:
    place = {"item_id": "i", "output_index": 0, "content_index": 0, "summary_index": 0}
    for name, kind in (
        ("content_part", "output_text"),
        ("content_part", "reasoning_text"),
        ("content_part", "refusal"),
        ("reasoning_summary_part", "summary_text"),
    ):
        part = {"type": kind, "refusal" if kind == "refusal" else "text": "Hey"}
        generation = decode(event(f"response.{name}.done", part=part, **place), completed()).generation
        assert generation.content + generation.reasoning + generation.refusal == "Hey"
    assert decode(event("response.content_part.done", part="Hey"), completed()).deltas == []


def test_ids_that_change_with_each_event_take_bounded_memory() -> None:
    decoder, told = ResponsesDecoder(), [text(f" w{n}", item_id=f"{n}", output_index=None) for n in range(5_000)]
    tracemalloc.start()
    for piece in told:
        decoder.feed(piece)
        assert decoder.next_delta() is not None
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 150 * 5_000
    whole = "".join(f" w{n}" for n in range(5_000))
    assert len(decode(*told, completed(message(whole))).deltas) == 5_000


TEXT_EVENTS = {"message": "response.output_text", "reasoning": "response.reasoning_text"}
LEAVES_OUT = st.sampled_from(
    [
        (),
        ("item_id",),
        ("output_index",),
        ("content_index",),
        ("item_id", "output_index"),
        ("item_id", "content_index"),
        ("item_id", "output_index", "content_index"),
    ]
)


@st.composite
def answers(draw: st.DrawFn) -> tuple[list[bytes], list[dict[str, Any]]]:
    """A stream that tells of each item by deltas, by the ends of its texts, by its own end, or not; and all items."""
    left_out, begins, ends, late = draw(LEAVES_OUT), draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    ids, renames = draw(st.sampled_from(["true", "empty", "rotating"])), draw(st.booleans())
    has_ids = ids == "true" and "item_id" not in left_out
    index_is = draw(st.sampled_from(["true", "one", "another at the end"])) if has_ids and not renames else "true"
    stream: list[bytes] = []
    behind: list[bytes] = []
    output: list[dict[str, Any]] = []
    for index in range(draw(st.integers(1, 4))):
        kind, how = draw(st.sampled_from([*TEXT_EVENTS])), draw(st.sampled_from(["delta", "done", "item", "final"]))
        item = message(*(f"<{index}.{number}>" for number in range(draw(st.integers(1, 2)))), type=kind)
        if ids == "empty":
            item["id"] = ""

        def add(name: str, index: int = index, item: dict[str, Any] = item, **fields: Any) -> None:
            id_ = f"{len(stream) + len(behind)}" if ids == "rotating" else item["id"]
            place = {"output_index": 0 if index_is == "one" else index, "item_id": id_, **fields}
            kept = {key: value for key, value in place.items() if "text" not in name or key not in left_out}
            content = [] if name.endswith("added") else item["content"]
            (behind if late and name.endswith("done") else stream).append(
                event(name, item={**item, "id": id_, "content": content}, **kept)
            )

        if begins and how != "final":
            add("response.output_item.added")
        for number, part in enumerate(item["content"] if how in ("delta", "done") else ()):
            for piece in (part["text"][:2], part["text"][2:]) if how == "delta" else ():
                add(f"{TEXT_EVENTS[kind]}.delta", delta=piece, content_index=number)
            add(f"{TEXT_EVENTS[kind]}.done", text=part["text"], content_index=number)
        if how == "item" or (ends and how != "final"):
            add("response.output_item.done", index=index + (index_is == "another at the end"))
        output.append({**item, "id": f"final_{index}"} if renames else item)
    return [*stream, *behind], output


@given(answers())
def test_each_text_is_published_once_however_the_server_tells_and_names_it(
    answer: tuple[list[bytes], list[dict[str, Any]]],
) -> None:
    stream, output = answer
    texts = sorted(part["text"] for item in output for part in item["content"])
    whole, without = decode(*stream, completed(*output)).generation, decode(*stream, completed()).generation
    assert sorted(re.findall("<.*?>", whole.content + whole.reasoning)) == texts
    said = re.findall("<.*?>", without.content + without.reasoning)
    assert len(said) == len(set(said)), "nothing twice where the final object is empty"


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
    spaces = event("response.output_text.done", text=" \n", content_index=2, item_id="msg_1", output_index=0)
    blank = decode(text(" ", content_index=0), text("\n", content_index=1), spaces, completed())
    assert blank.generation.content == " \n", "a text without any words as well"
    place = {"output_index": 0, "item_id": "Hey"}
    thoughts = [
        event("response.reasoning_text.delta", delta=piece, content_index=number, **place)
        for number, piece in ((7, "He"), (8, "y"))
    ]
    done = event("response.reasoning_text.done", text="Hey", content_index=9, **place)
    assert decode(*thoughts, done, completed(message("Hey", type="reasoning"))).generation.reasoning == "Hey"


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
