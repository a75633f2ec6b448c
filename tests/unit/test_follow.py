"""What a reader may take of a page does not depend on how much of it is taken at once."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltafan import _follow
from deltafan._events import Event
from deltafan._follow import Follower, RawEntry
from deltafan._position import Position

ODD = (b"reasoning", b"of a later version", b"completed", b"cancelled")
MODES = (b'{"mode":"fresh"}', b'{"mode":"continue"}')
PLACES = st.tuples(st.integers(1, 3), st.integers(0, 9))


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[RawEntry], list[RawEntry]]:
    """Attempts with a hole now and then and, here and there, another type of entry or an end; and the same, mended."""
    whole: list[RawEntry] = []
    left_out: list[RawEntry] = []
    for attempt in range(1, draw(st.integers(2, 4))):
        first, last = draw(st.sampled_from((0, 0, 0, 1))), draw(st.sampled_from((5, 24, 40)))
        hole, odd = draw(st.sampled_from((-1, -1, 7, 13, 24))), draw(st.sampled_from((-1, 6, 13, 24)))
        for seq in range(first, last + 1):
            kind = b"started" if seq == 0 else draw(st.sampled_from(ODD)) if seq == odd else b"content"
            data = draw(st.sampled_from(MODES)) if seq == 0 else b"%d" % seq
            whole.append((b"%d-%d" % (attempt, seq), [b"type", kind, b"data", data]))
            if seq == hole:
                left_out.append(whole[-1])
    return [entry for entry in whole if entry not in left_out], whole


def followed(pages: Sequence[Sequence[RawEntry]], after: Position | None) -> tuple[list[Event], object]:
    follower = Follower(after)
    events = [event for page in pages for event in follower.take(page)]
    return events, (follower.cursor, follower.ended, follower.range_start)


@settings(max_examples=400)
@given(streams(), st.lists(st.sampled_from((1, 7, 8, 13, 14, 24, 25)), max_size=3), st.none() | PLACES)
def test_a_run_of_entries_is_taken_as_each_of_them_would_be(
    streams: tuple[list[RawEntry], list[RawEntry]], cuts: list[int], after: tuple[int, int] | None
) -> None:
    at = None if after is None else Position(*after)
    pages = [stream[start:end] for stream in streams for start, end in pairwise([0, *sorted(cuts), len(stream)])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_follow, "_MANY", 10**9)
        one_by_one = followed(pages, at)
    assert followed(pages, at) == one_by_one
    assert all(type(event) is Event and type(event.position) is Position for event in followed(pages, at)[0])


def test_a_page_that_goes_on_is_taken_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    page: list[RawEntry] = [(b"5-%d" % seq, [b"type", b"content", b"data", b"x"]) for seq in range(1, 1001)]
    monkeypatch.setattr(Position, "parse", None)
    follower = Follower(Position(5, 0))
    assert len(follower._take_run(page)) == 1000
    assert (follower.cursor, follower.ended) == ((5, 1000), False)
    last: list[RawEntry] = [(b"5-%d" % seq, [b"type", b"content", b"data", b"x"]) for seq in range(1001, 1010)]
    last.append((b"5-1010", [b"type", b"completed", b"data", b"{}"]))
    assert len(follower._take_run(last)) == 10
    assert (follower.cursor, follower.ended) == ((5, 1010), True)
