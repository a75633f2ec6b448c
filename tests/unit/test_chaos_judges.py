"""What judges the chaos runs sees what it is for: the runs themselves are clean, so nothing else would show that."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from bills import Calls, count_repeated, count_wrong
from deltafan import Event, Position, UsageRecord
from jobs import Job
from silences import Recovery
from transcripts import Transcript
from verdicts import ends_of, judge

JOB = Job(number=7, deltas=4, gap_ms=0, thoughts=1)
STARTED = b'{"mode":"%b","attempt_no":1,"run":"r"%b}'


def started(attempt: int, mode: str = "fresh", origin: str = "") -> Event:
    members = f',"from":"{origin}"' if origin else ""
    return Event(Position(attempt, 0), "started", STARTED % (mode.encode(), members.encode()))


def delta(attempt: int, seq: int, index: int, call: int = 1, type_: str = "content") -> Event:
    return Event(Position(attempt, seq), "reasoning" if index == 0 else type_, f"7.{call}.{index};".encode())


def end(attempt: int, seq: int, type_: str = "completed", data: bytes = b'{"finish_reason":"stop"}') -> Event:
    return Event(Position(attempt, seq), type_, data)


def verdict(*events: Event, job: Job = JOB, cancel: str | None = None, was_endless: bool = False) -> Counter[str]:
    transcript = Transcript()
    for event in events:
        transcript.take(event)
    ends = ends_of(job, cancel=cancel, was_endless=was_endless)
    return judge(job, transcript, ends, was_endless=was_endless)


WHOLE = (started(1), *(delta(1, index + 1, index) for index in range(4)), end(1, 5))
FAILED = end(1, 2, "failed", b'{"code":"output_too_long","message":"","retryable":false}')


def test_a_whole_answer_is_right() -> None:
    assert verdict(*WHOLE) == Counter()
    assert (
        verdict(
            started(1),
            delta(1, 1, 0),
            started(2, "restart"),
            *[delta(2, index + 1, index, call=2) for index in range(4)],
            end(2, 5),
        )
        == Counter()
    )


@pytest.mark.parametrize(
    ("events", "found"),
    [
        ((started(1), delta(1, 1, 0), delta(1, 2, 1), delta(1, 3, 3), end(1, 4)), {"lost": 1, "wrong": 1}),
        ((*WHOLE[:5], delta(1, 5, 3), end(1, 6)), {"dup": 1, "wrong": 1}),
        ((*WHOLE[:2], delta(1, 2, 2), delta(1, 3, 1), *WHOLE[4:]), {"disord": 1, "wrong": 1}),
        ((*WHOLE[:4], delta(1, 4, 3, call=2), end(1, 5)), {"wrong": 1}),
        ((*WHOLE[:4], delta(1, 4, 3, type_="reasoning"), end(1, 5)), {"wrong": 1}),
        ((*WHOLE[:5], Event(Position(1, 5), "content", b"7.1."), end(1, 6)), {"wrong": 1}),
        ((*WHOLE[:5], end(1, 6)), {"wrong": 1}),
        ((*WHOLE, end(2, 0)), {"wrong": 1}),
        ((*WHOLE[:5], Event(Position(1, 5), "tool_call", b"{}"), end(1, 6)), {"wrong": 1}),
        ((started(2), *WHOLE), {"wrong": 1}),
        ((*WHOLE[:5], end(1, 5, data=b'{"finish_reason":"length"}')), {"wrong": 1}),
        ((started(1), delta(1, 1, 0), FAILED), {"wrong": 1}),
        ((started(1), delta(1, 1, 0), end(1, 2, "cancelled", b'{"reason":"requested"}')), {"wrong": 1}),
        (WHOLE[:5], {"lost": 4, "wrong": 1, "stuck": 1}),
    ],
)  # fmt: skip
def test_whatever_else_a_reader_may_have_is_wrong(events: tuple[Event, ...], found: dict[str, int]) -> None:
    assert verdict(*events) == Counter(found)


def test_an_end_is_right_where_the_job_may_have_it() -> None:
    cancelled = (started(1), delta(1, 1, 0), end(1, 2, "cancelled", b'{"reason":"requested"}'))
    assert verdict(*cancelled, cancel="asked") == verdict(*WHOLE, cancel="asked") == Counter()
    assert verdict(*cancelled, cancel="promised") == Counter()
    assert verdict(*WHOLE, cancel="promised") == Counter(wrong=1)
    assert verdict(started(1), delta(1, 1, 0), FAILED, was_endless=True) == Counter()


def test_an_answer_that_goes_on_is_of_two_calls() -> None:
    beginning = started(1), delta(1, 1, 0), delta(1, 2, 1), delta(1, 3, 2)
    rest = started(2, "continue", "1-2"), delta(2, 1, 2, call=2), delta(2, 2, 3, call=2), end(2, 3)
    assert verdict(*beginning, *rest, job=replace(JOB, on_interrupt="continue")) == Counter()
    assert verdict(*beginning, *rest) == Counter(wrong=1)


def record(call: str, outcome: Any = "completed", **changes: Any) -> UsageRecord:
    fields: dict[str, Any] = {"source": "none"}
    if outcome == "completed":
        fields = {"output_tokens": 4, "deltas": 4, "cost": (5 * 1.0 + 4 * 2.0) / 1_000_000, "source": "provider"}
    names = {"job_id": JOB.id, "call_id": call, "provider": "p", "model": "m", "api": "chat", "outcome": outcome}
    return UsageRecord.from_json({"attempt": 1, "attempt_no": 1, **names, **fields, **changes})


@pytest.mark.parametrize(
    ("records", "found"),
    [
        ([record("a", "lost"), record("b")], {}),
        ([record("b")], {"no bill": 1}),
        ([record("a", "lost"), record("b", "lost")], {"no bill": 1}),
        ([record("a"), record("b")], {"2x bill": 1}),
        ([record("b"), *[record(call, "failed", source="estimated") for call in "ac"]], {"2x bill": 1}),
        ([record("a", "lost"), record("b", output_tokens=5)], {"no bill": 1}),
        ([record("a", "lost"), record("b", cost=None)], {"no bill": 1}),
        ([record("a", "lost"), record("b", source="estimated")], {"no bill": 1}),
    ],
)  # fmt: skip
def test_a_ledger_has_one_right_record_of_each_call(records: list[UsageRecord], found: dict[str, int]) -> None:
    calls = Calls(begun={7: 2}, whole={7: 2}, endless={})
    assert count_wrong(JOB, "completed", records, calls, may_miss=False) == Counter(found)


def test_a_record_that_is_there_twice_is_seen() -> None:
    assert count_repeated([record("a"), record("b"), record("a")]) == 1


def test_a_reader_is_held_up_from_the_first_fault_of_its_silence_on() -> None:
    recovery = Recovery([10.0, 12.0, 30.0])
    recovery.heard("unhurt", 13.0, 20.0)
    recovery.heard("hurt", 9.5, 12.5)
    recovery.heard("later", 11.0, 13.0)
    assert recovery.worst() == (2.5, "hurt")
    undisturbed = Recovery([10.0])
    undisturbed.heard("before", 1.0, 9.0)
    assert undisturbed.worst() == (0.0, "")
