import hiredis
from hypothesis import given
from hypothesis import strategies as st

from deltafan._events import Delta, tool_call_data
from deltafan._fold import fold
from deltafan_worker._log import AttemptLog, append_head

TEXT = st.text(min_size=1, max_size=8).map(lambda text: text.encode("utf-8", "replace"))
DELTAS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["content", "reasoning", "refusal"]), TEXT).map(lambda pair: Delta(*pair)),
        st.tuples(st.integers(0, 2), st.text("ab", max_size=3)).map(
            lambda pair: Delta("tool_call", tool_call_data(pair[0], call_id=f"c{pair[0]}", name="f", arguments=pair[1]))
        ),
    ),
    max_size=30,
)


def filled(deltas: list[Delta]) -> AttemptLog:
    log = AttemptLog()
    log.extend(deltas)
    return log


@given(DELTAS)
def test_its_texts_are_what_folding_its_events_gives(deltas: list[Delta]) -> None:
    log = filled(deltas)
    folded = fold(log.events(5))
    assert (log.text("content"), log.text("reasoning"), log.text("refusal")) == (
        folded.content,
        folded.reasoning,
        folded.refusal,
    )
    assert log.tool_calls() == folded.tool_calls
    assert [(event.type, event.data) for event in log.events(5)] == deltas
    assert log.size_bytes == sum(len(delta.data) for delta in deltas)


@given(DELTAS, st.integers(0, 30))
def test_its_commands_append_each_entry_under_its_own_id(deltas: list[Delta], first: int) -> None:
    log = filled(deltas)
    first = min(first, len(deltas))
    reader = hiredis.Reader()
    commands = log.commands(append_head("some:key"), 5, first)
    assert len(commands) == len(deltas) - first
    for seq, (command, delta) in enumerate(zip(commands, deltas[first:], strict=True), first + 1):
        reader.feed(command)
        assert reader.gets() == [
            b"XADD",
            b"some:key",
            b"NOMKSTREAM",
            b"5-%d" % seq,
            b"type",
            delta.type.encode(),
            b"data",
            delta.data,
        ]


def test_a_short_delta_takes_its_bytes_and_five() -> None:
    log = filled([Delta("content", b" token")] * 1000)
    held = len(log._codes) + log._ends.itemsize * len(log._ends) + len(log._data)
    assert held == 1000 * (6 + 5)
