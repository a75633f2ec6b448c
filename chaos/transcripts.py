"""What a reader has, and what is wrong with it."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from deltafan import Event

TOKEN = re.compile(r"(\d+)\.(\d+)\.(\d+);")


@dataclass(frozen=True, slots=True)
class Job:
    """A job and the answer it must get."""

    id: str
    number: int
    deltas: int
    gap_ms: int

    @property
    def prompt(self) -> str:
        """What tells the model server what to answer."""
        return f"{self.number}:{self.deltas}:{self.gap_ms}"


@dataclass(slots=True)
class Transcript:
    """The deltas that count for one reader, by the rules of PROTOCOL.md."""

    deltas: list[str] = field(default_factory=list)
    status: str = ""

    def take(self, event: Event) -> None:
        """Take the next event."""
        started = event.started
        if started is not None and started.mode != "continue":
            self.deltas.clear()
        elif event.is_terminal:
            self.status = event.type
        elif event.text:
            self.deltas.append(event.text)

    def take_text(self, text: str) -> None:
        """Take what a snapshot or a result has joined."""
        self.deltas += [match[0] for match in TOKEN.finditer(text)]


@dataclass(slots=True)
class Verdict:
    """What is wrong with some transcripts, counted."""

    lost: int = 0
    duplicated: int = 0
    disordered: int = 0
    wrong: int = 0

    def add(self, other: "Verdict") -> None:
        """Count another one in."""
        self.lost += other.lost
        self.duplicated += other.duplicated
        self.disordered += other.disordered
        self.wrong += other.wrong


def judge(job: Job, transcript: Transcript | None) -> Verdict:
    """Compare with what the model server sends: all deltas of one call, each once, in order."""
    if transcript is None or transcript.status != "completed":
        return Verdict(lost=job.deltas, wrong=1)
    found = [TOKEN.fullmatch(delta) for delta in transcript.deltas]
    named = [(int(match[1]), int(match[2]), int(match[3])) for match in found if match]
    indexes = [index for _, _, index in named]
    verdict = Verdict(
        lost=len(set(range(job.deltas)) - set(indexes)),
        duplicated=sum(count - 1 for count in Counter(indexes).values()),
        disordered=sum(later < earlier for earlier, later in _pairs(indexes)),
    )
    is_one_call = len({(number, call) for number, call, _ in named}) == 1 and named[0][0] == job.number
    if not (is_one_call and len(named) == len(found) and indexes == list(range(job.deltas))):
        verdict.wrong = 1
    return verdict


def _pairs(values: list[int]) -> Iterable[tuple[int, int]]:
    return pairwise(values)
