"""The account of a scenario: what is wrong with each transcript and each bill, counted by the table's columns."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bills import Calls, count_repeated, count_wrong
from deltafan import UsageRecord
from faults import Fault
from jobs import Job
from load import Load
from readers import Reading
from silences import BOUND_S, MIXED_BOUND_S
from transcripts import TOKEN, Transcript
from verdicts import ends_of, judge, judge_beginning

COUNTED = ("runs", "faults", "jobs", "deltas")
WRONG = ("lost", "dup", "disord", "wrong", "2x bill", "no bill", "spent", "stuck")


@dataclass
class Account:
    """What came out, over any number of scenarios."""

    counts: Counter[str] = field(default_factory=Counter)
    completed: int = 0
    """Answers that were read to their end."""
    recovery_s: float = 0.0
    examples: list[str] = field(default_factory=list)

    def add(self, other: "Account") -> None:
        """Count another one in."""
        self.counts += other.counts
        self.recovery_s = max(self.recovery_s, other.recovery_s)

    def note(self, found: Counter[str], example: str) -> None:
        """Count what is wrong with something, and say with what."""
        self.counts += found
        if any(found.values()):
            self.examples.append(f"{dict(found)}: {example}")

    @property
    def is_clean(self) -> bool:
        """Whether nothing is wrong."""
        return not any(self.counts[name] for name in WRONG)


class Traits:
    """What may be asked of a scenario with these faults."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.persistent = any(fault.persistent for fault in faults)
        self.replicated = any(fault.replicated for fault in faults)
        self.forgets = any(fault.forgets for fault in faults)
        self.bound_s = BOUND_S if len(faults) == 1 else MIXED_BOUND_S
        self.spares_runs = all(fault.spares_runs for fault in faults)
        self.goes_back = self.replicated or self.forgets
        """An end that one reader has seen, or a cancel that was acknowledged, may be lost: PROTOCOL.md says so under
        "Not guaranteed"."""


def judge_readers(account: Account, load: Load, reading: Reading, calls: Calls, traits: Traits) -> None:
    """Compare every transcript with what the model server sends, and those of one job with each other."""
    for (job, kind), transcript in load.transcripts.items():
        was_endless = calls.endless.get(job.number, 0) > 0
        cancel = load.cancels.get(job.id)
        ends = ends_of(job, cancel="asked" if cancel and traits.goes_back else cancel, was_endless=was_endless)
        found = judge(job, transcript, ends, was_endless=was_endless)
        if transcript is not None:
            account.counts["deltas"] += transcript.taken
            account.completed += transcript.status == "completed"
            found["spent"] += traits.spares_runs and transcript.runs > 1
            found["wrong"] += job.on_interrupt == "fail" and transcript.restarts > 0 and not traits.goes_back
        account.note(+found, f"{_shown(job)} read {kind}: {_read(transcript)}")
    for job, kind, transcript in reading.beginnings:
        account.counts["deltas"] += transcript.taken
        found = judge_beginning(job, transcript, len(transcript.pieces))
        account.note(found, f"{_shown(job)} read {kind}, before its stream was deleted: {_read(transcript)}")
    if not traits.goes_back:
        for job in load.jobs:
            if len(answers := _answers(load, job)) > 1:
                account.note(Counter(wrong=1), f"{_shown(job)}: its readers have different ends, {answers}")
    account.note(Counter(lost=len(load.forgotten)), f"the server did not know {load.forgotten} any more")
    account.note(Counter(wrong=len(load.errors)), "; ".join(load.errors))
    account.recovery_s, slowest = reading.recovery.worst()
    if account.recovery_s > traits.bound_s:
        account.note(Counter(stuck=1), f"{slowest} was held up for {account.recovery_s:.1f} s")


def bills_of(load: Load, records: Sequence[UsageRecord], calls: Calls, traits: Traits) -> Mapping[str, Counter[str]]:
    """What is wrong with the ledger, by whose bill it is."""
    wrong = {"the ledger": +Counter({"2x bill": count_repeated(records)})}
    by_job: dict[str, list[UsageRecord]] = {}
    for record in records:
        by_job.setdefault(record.job_id, []).append(record)
    for job in load.jobs if not traits.forgets else ():
        mine, status = by_job.get(job.id, []), _agreed_end(load, job, traits)
        counts = f"{calls.begun.get(job.number, 0)} calls, {calls.whole.get(job.number, 0)} unbroken"
        name = f"{_shown(job)}, {status}, {counts}, records {[record.outcome for record in mine]}"
        wrong[name] = count_wrong(job, status, mine, calls, may_miss=traits.replicated)
    return {name: found for name, found in wrong.items() if found}


def _answers(load: Load, job: Job) -> set[tuple[str, int]]:
    """How the job ended, and by which call if it has a whole answer, as each of its readers has it."""
    found = set()
    for kind in job.readers:
        if (transcript := load.transcripts[job, kind]) is not None:
            is_whole = transcript.status == "completed" and transcript.pieces
            token = TOKEN.fullmatch(transcript.pieces[-1].text) if is_whole else None
            found.add((transcript.status, int(token[2]) if token else 0))
    return found


def _agreed_end(load: Load, job: Job, traits: Traits) -> str | None:
    """How the job ended; None when its readers can not tell, or it may have ended otherwise than they saw."""
    ends = {status for status, _ in _answers(load, job)}
    may_differ = traits.goes_back and (job.on_interrupt == "fail" or job.id in load.cancels)
    return ends.pop() if len(ends) == 1 and not may_differ else None


def _shown(job: Job) -> str:
    return f"{job.id} ({job.prompt}, {job.lane}, {job.on_interrupt})"


def _read(transcript: Transcript | None) -> str:
    if transcript is None:
        return "never ended"
    deltas = [piece.text for piece in transcript.pieces]
    shown = deltas if len(deltas) < 12 else [*deltas[:6], "…", *deltas[-5:]]
    return f"{transcript.status} ({transcript.reason}) {transcript.message}, {transcript.breaches} {' '.join(shown)}"
