"""How far a batch is, what it has cost, and how many more rows the limit of its cost allows."""

import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deltafan.batch import BatchFiles, Outcome

_SAMPLES = 20_000
"""Values that percentiles are taken from; more would only cost memory."""
_FEW = 10
"""Rows that are tried before one has told what a row costs."""


@dataclass(slots=True)
class Sample:
    """Percentiles of seconds, at bounded memory."""

    seen: int = 0
    values: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        """Take a value into account."""
        self.seen += 1
        if len(self.values) < _SAMPLES:
            self.values.append(value)
        elif (place := random.randrange(self.seen)) < _SAMPLES:  # so that each is as likely to be kept
            self.values[place] = value

    def percentiles(self) -> dict[str, float]:
        """By nearest rank."""
        ordered = sorted(self.values) or [0.0]
        return {
            f"p{percent}_s": round(ordered[round(percent / 100 * (len(ordered) - 1))], 3) for percent in (50, 90, 99)
        }


@dataclass(slots=True)
class Tally:
    """How far a run is. Tokens and cost are of all runs of the batch."""

    rows: int
    answered_before: int
    cost: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """By currency."""
    tokens: Counter[str] = field(default_factory=Counter)
    tokens_before: int = 0
    answered: int = 0
    failed: int = 0
    in_flight: int = 0
    started_s: float = field(default_factory=time.monotonic)
    errors: Counter[str] = field(default_factory=Counter)
    latency: Sample = field(default_factory=Sample)
    """Of rows: from submit to end, so most of it is waiting for a slot, behind the rows before."""
    model_latency: Sample = field(default_factory=Sample)
    """Of their last model calls."""
    last_end_s: float = field(default_factory=time.monotonic)
    limit_cost: float | None = None
    guess: Mapping[str, float] = field(default_factory=dict)
    """What a row may cost, by currency, as long as none has told."""

    @classmethod
    def of(cls, files: BatchFiles, limit_cost: float | None, guess: Mapping[str, float]) -> "Tally":
        """Where earlier runs have left it."""
        spent, tokens = defaultdict(float, files.spent), Counter(files.tokens)
        before = tokens["output_tokens"]
        return cls(files.rows, files.answered, spent, tokens, before, limit_cost=limit_cost, guess=guess)

    @property
    def ended(self) -> int:
        """Rows of this run that have ended."""
        return self.answered + self.failed

    @property
    def quiet_s(self) -> float:
        """How long ago the last row ended."""
        return time.monotonic() - self.last_end_s

    @property
    def left(self) -> int:
        """Rows that have not ended, in this run or with an answer in an earlier one."""
        return self.rows - self.answered_before - self.ended

    @property
    def is_whole(self) -> bool:
        """Whether every row has an answer."""
        return self.answered_before + self.answered == self.rows

    def add(self, outcome: Outcome) -> None:
        """Count a row."""
        if outcome.is_answer:
            self.answered += 1
        else:
            self.failed += 1
            self.errors[outcome.error_code or "unknown"] += 1
        self.last_end_s = time.monotonic()
        self.latency.add(outcome.seconds)
        if (usage := outcome.generation.usage) is not None:
            if usage.duration_ms is not None:
                self.model_latency.add(usage.duration_ms / 1000)
            self.tokens.update(input_tokens=usage.input_tokens or 0, output_tokens=usage.output_tokens or 0)
            if usage.currency:
                self.cost[usage.currency] += usage.cost or 0.0

    def affords(self) -> int:
        """How many rows may be in flight, so that the limit holds when they cost as much as those before.

        Few until some have ended, since the first ones may not be like the others.
        """
        if self.limit_cost is None:
            return sys.maxsize
        rows_ended = self.answered_before + self.ended
        means = {currency: cost / rows_ended for currency, cost in self.cost.items()} if rows_ended else self.guess
        most = _FEW + 2 * rows_ended
        for currency, mean in means.items():
            if mean > 0:
                most = min(most, int((self.limit_cost - self.cost.get(currency, 0.0)) / mean))
        if self.is_over:
            return 0
        return max(int(rows_ended == 0), most)  # one, to learn what it costs

    @property
    def is_over(self) -> bool:
        """Whether the limit is spent, whatever rows still to come may cost."""
        return self.limit_cost is not None and max([0.0, *self.cost.values()]) >= self.limit_cost

    def progress(self) -> dict[str, Any]:
        """The figures, as other machines and `--json` get them."""
        elapsed_s = max(time.monotonic() - self.started_s, 1e-6)
        return {
            "rows": self.rows,
            "answered": self.answered_before + self.answered,
            "failed": self.failed,
            "in_flight": self.in_flight,
            "tokens_per_s": round((self.tokens["output_tokens"] - self.tokens_before) / elapsed_s, 1),
            "input_tokens": self.tokens["input_tokens"],
            "output_tokens": self.tokens["output_tokens"],
            "cost": {currency: round(cost, 6) for currency, cost in self.cost.items()},
            "left_s": round(self.left * elapsed_s / self.ended) if self.ended else 0,
        }
