from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltafan_worker._sse import SseDecoder, SseEvent, SseLimitExceeded
from support.reference_decoders import sse_events


def decode(*pieces: bytes, limit_bytes: int = 1 << 20) -> list[SseEvent]:
    decoder = SseDecoder(limit_bytes)
    events = []
    for piece in pieces:
        decoder.feed(piece)
        while (event := decoder.next_event()) is not None:
            events.append(event)
    decoder.end()
    while (event := decoder.next_event()) is not None:
        events.append(event)
    return events


def datas(*pieces: bytes) -> list[bytes]:
    return [event.data for event in decode(*pieces)]


def test_one_space_after_the_colon_is_no_part_of_the_data() -> None:
    assert datas(b"data: x\n\ndata:y\n\ndata:  z\n\n") == [b"x", b"y", b" z"]


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_every_line_end_of_the_standard(end: bytes) -> None:
    stream = end.join([b"data: a", b"", b"data: b", b"", b""])
    assert datas(stream) == [b"a", b"b"]
    assert datas(*[bytes([byte]) for byte in stream]) == [b"a", b"b"]


def test_crlf_cut_between_reads_is_one_line_end() -> None:
    assert datas(b"data: a\r", b"\ndata: b\r", b"\n\r", b"\n") == [b"a\nb"]


def test_other_line_separators_are_text() -> None:
    text = "a\u2028b\u0085c\x0cd".encode()
    assert datas(b"data: " + text + b"\n\n") == [text]


def test_a_byte_order_mark_is_skipped_once() -> None:
    assert datas(b"\xef\xbb", b"\xbfdata: a\n\n") == [b"a"]
    assert datas(b"\xef", b"\xbb") == []


def test_data_lines_are_joined() -> None:
    assert datas(b"data: a\ndata:\ndata: b\n\n") == [b"a\n\nb"]


@pytest.mark.parametrize(
    "block", [b": ping\n\n", b"data:\n\n", b"event: ping\n\n", b"retry: 100\n\n", b"id: 7\n\n", b"\n"]
)
def test_keep_alives_deliver_nothing(block: bytes) -> None:
    assert datas(b"id: 1\ndata: a\n\n" + block + block + b"data: b\n\n") == [b"a", b"b"]


def test_frames_without_blank_lines_are_told_apart_by_their_ids() -> None:
    stream = b"id:1\nevent:result\n:HTTP_STATUS/200\ndata:{1}\nid:2\nevent:result\n:HTTP_STATUS/429\ndata:{2}\n"
    assert decode(stream) == [SseEvent(b"result", b"{1}", 200), SseEvent(b"result", b"{2}", 429)]


@pytest.mark.parametrize("head", [b"id:2\n", b"event:result\n"])
def test_either_of_the_lines_before_the_data_begins_an_event(head: bytes) -> None:
    assert datas(b"data:a\n" + head + b"data:b\n") == [b"a", b"b"]


def test_what_is_pending_at_the_end_is_delivered() -> None:
    assert datas(b"data: a\n\ndata: b") == [b"a", b"b"]
    assert datas(b"data: a\n") == [b"a"]


def test_the_event_name_does_not_outlive_its_block() -> None:
    assert [event.event for event in decode(b"event: error\ndata: a\n\ndata: b\n\n")] == [b"error", b""]


def test_events_before_an_overlong_one_are_delivered_first() -> None:
    decoder = SseDecoder(limit_bytes=100)
    decoder.feed(b"data: a\n\ndata: " + b"x" * 101)
    assert decoder.next_event() == SseEvent(b"", b"a", None)
    for _ in range(2):
        with pytest.raises(SseLimitExceeded):
            decoder.next_event()


def test_many_short_data_lines_are_limited_too() -> None:
    decoder = SseDecoder(limit_bytes=100)
    for _ in range(60):
        decoder.feed(b"data: xx\n")
    with pytest.raises(SseLimitExceeded):
        decoder.next_event()


@pytest.mark.parametrize("size", [6, 4096])
def test_many_empty_data_lines_are_limited_too(size: int) -> None:
    decoder, lines = SseDecoder(limit_bytes=10_000), b"data:\n" * 1000
    for at in range(0, len(lines), size):
        decoder.feed(lines[at : at + size])
    with pytest.raises(SseLimitExceeded):
        decoder.next_event()


@pytest.mark.parametrize("size", [1, 30, 1000])
def test_the_limit_does_not_depend_on_how_an_event_of_many_lines_is_cut(size: int) -> None:
    decoder, event = SseDecoder(limit_bytes=1000), b"data:\n" * 20 + b"\n"
    for at in range(0, len(event), size):
        decoder.feed(event[at : at + size])
    with pytest.raises(SseLimitExceeded):
        decoder.next_event()


def test_the_limit_holds_for_an_event_that_comes_whole() -> None:
    decoder = SseDecoder(limit_bytes=1000)
    decoder.feed(b": hello\n")
    decoder.feed(b'data: {"a":"' + b"x" * 1000 + b'"}\n\n')
    with pytest.raises(SseLimitExceeded):
        decoder.next_event()


@pytest.mark.parametrize(
    ("head", "event"), [(b"event: a\n", (b"a", b"{}", None)), (b":HTTP_STATUS/400\n", (b"", b"{}", 400))]
)
def test_what_stands_before_an_event_may_come_before_it(head: bytes, event: tuple[bytes, bytes, int | None]) -> None:
    assert decode(b": hello\n", head, b"data: {}\n\n") == [event]


def test_many_names_without_data_are_looked_through_once() -> None:
    """A pattern that tries each blank both ways would never come back."""
    decoder = SseDecoder()
    decoder.feed(b": hello\n")
    decoder.feed(b"event: a\n" * 60 + b"\n")
    assert decoder.next_event() is None


def test_frames_with_nothing_between_them_come_one_by_one() -> None:
    decoder = SseDecoder()
    decoder.feed(b'data: {"a":\ndata: {"b":1}}\ndata: {2}\n')
    assert decoder.next_event() == SseEvent(b"", b'{"a":\n{"b":1}}', None), "as soon as the next one begins"
    assert decoder.next_event() is None
    assert datas(b"data: {1}\ndata: [DONE]\n") == [b"{1}", b"[DONE]"]


def test_a_long_line_in_small_pieces_takes_linear_work() -> None:
    class Counting(bytes):
        joined = 0

    decoder = SseDecoder()
    for _ in range(20_000):
        decoder.feed(b"x" * 50)
    assert len(decoder._line) == 20_000, "pieces are kept as they came and joined once"
    assert decoder._line_bytes == 1_000_000


LINES = st.sampled_from(
    [
        b"data: a",
        b"data:b",
        b"data: {",
        b"data: }",
        b"data: [DONE]",
        b"data",
        b"data:",
        b": c",
        b"event: e",
        b"id: 1",
        b"id",
        b"retry: 9",
        b"",
        b"",
        b"data: \xc3\xa9",
        b"x: y",
    ]
)
STREAMS = st.tuples(
    st.sampled_from([b"", b"\xef\xbb\xbf"]),
    st.lists(st.tuples(LINES, st.sampled_from([b"\n", b"\r", b"\r\n"])), max_size=12),
    st.sampled_from([b"", b"data: tail", b"id: 2"]),
).map(lambda parts: parts[0] + b"".join(line + end for line, end in parts[1]) + parts[2])


def cut(data: bytes, at: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(place % (len(data) + 1) for place in at)})
    return [data[a:b] for a, b in pairwise(places)]


def as_text(events: list[SseEvent]) -> list[tuple[str, str, int | None]]:
    return [(event.event.decode("latin-1"), event.data.decode("latin-1"), event.status) for event in events]


@given(STREAMS, st.lists(st.integers(0, 400), max_size=8))
def test_agrees_with_the_reference_however_it_is_cut(stream: bytes, at: list[int]) -> None:
    expected = sse_events(stream)
    for pieces in ([stream], cut(stream, at), [bytes([byte]) for byte in stream]):
        assert as_text(decode(*pieces)) == expected


HEADS = (
    "event: a",
    "event:b",
    "event:  c",
    "id:1",
    "id: 2",
    ":HTTP_STATUS/200",
    ": HTTP_STATUS/400",
    ": ping",
    "retry: 1",
)
OBJECTS = (
    'data: {"a":1}',
    'data:{"b":2}',
    "data:  {3}",
    "data: {4\r}",
    'data: {"c"',
    "data: 5}",
    "data: [DONE]",
    "data:",
)
PACKETS = st.builds(
    lambda heads, objects, end: ("\n".join([*heads, *objects]) + end).encode(),
    st.lists(st.sampled_from(HEADS), max_size=2),
    st.lists(st.sampled_from(OBJECTS), min_size=1, max_size=2),
    st.sampled_from(("\n\n", "\n\n", "\n\n", "\n", "\n\n\n", "\r\n\r\n", "\r", "")),
)


@settings(max_examples=1000)
@given(st.lists(st.lists(PACKETS, min_size=1, max_size=2).map(b"".join), min_size=2, max_size=4))
def test_agrees_with_the_reference_where_packets_hold_whole_events(packets: list[bytes]) -> None:
    """As they mostly do, so that there is a short way for them; it begins behind the first packet."""
    packets = [b": hello\n", *packets]
    assert as_text(decode(*packets)) == sse_events(b"".join(packets))


@given(st.lists(st.binary(max_size=60), max_size=8))
def test_arbitrary_bytes_raise_nothing_and_agree_with_the_reference(pieces: list[bytes]) -> None:
    assert as_text(decode(*pieces)) == sse_events(b"".join(pieces))
