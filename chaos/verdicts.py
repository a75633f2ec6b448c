"""What is wrong with a transcript, held against what the model server sends."""

from collections import Counter
from collections.abc import Collection
from itertools import pairwise

from jobs import Job
from transcripts import TOKEN, Transcript

ENDLESS = "output_too_long"
DEFECTS = frozenset({"internal_error", "too_many_attempts", "stream_lost", "not_run", "lost_in_run", "lost_before_run"})
"""Failures that no fault of these excuses, whatever the job allows."""


def ends_of(job: Job, *, cancel: str | None, was_endless: bool) -> Collection[str]:
    """The ends that a job may have. `cancel`: None, `asked`, or `promised` when it was acknowledged."""
    ends = {"completed"}
    if cancel is not None:
        ends = {"cancelled"} if cancel == "promised" else {"completed", "cancelled"}
    if job.on_interrupt == "fail" or was_endless:
        ends.add("failed")
    return ends


def judge(job: Job, transcript: Transcript | None, ends: Collection[str], *, was_endless: bool) -> Counter[str]:
    """What is wrong, counted by the table's columns: all deltas of one call, each once, in order, and the right end."""
    if transcript is None or not transcript.status:
        return Counter({"lost": job.deltas, "wrong": 1, "stuck": 1})
    found = judge_beginning(job, transcript, len(transcript.pieces))
    if transcript.status == "completed":
        found = judge_beginning(job, transcript, job.deltas)
        is_right = len(transcript.pieces) == job.deltas and transcript.reason == "stop"
    elif transcript.status == "failed":
        is_cut = was_endless and transcript.reason == ENDLESS
        is_right = is_cut or (job.on_interrupt == "fail" and transcript.reason not in DEFECTS | {ENDLESS})
    else:
        is_right = True
    if transcript.status not in ends or not is_right:
        found["wrong"] = 1
    return found


def judge_beginning(job: Job, transcript: Transcript, length: int) -> Counter[str]:
    """What is wrong with a transcript that must hold the first `length` deltas of one call."""
    matches = [TOKEN.fullmatch(piece.text) for piece in transcript.pieces]
    named = [tuple(map(int, match.groups())) for match in matches if match]
    indexes = [index for _, _, index in named]
    calls = [call for _, call, _ in named]
    types = ["reasoning" if index < job.thoughts else "content" for index in indexes]
    # What goes on with a call's beginning is of a later call.
    is_one_answer = calls == sorted(calls) if job.on_interrupt == "continue" else len(set(calls)) <= 1
    is_right = (
        is_one_answer
        and all(number == job.number for number, _, _ in named)
        and indexes == list(range(len(indexes)))
        and types == [piece.type for piece in transcript.pieces]
        and not transcript.breaches
    )
    return +Counter(
        {
            "lost": len(set(range(length)) - set(indexes)),
            "dup": sum(count - 1 for count in Counter(indexes).values()),
            "disord": sum(later < earlier for earlier, later in pairwise(indexes)),
            "wrong": int(not is_right),
        }
    )
