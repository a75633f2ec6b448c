"""What is asked for: jobs of every kind, drawn from a seed, and who reads each."""

import random
from dataclasses import dataclass
from typing import Any

LONG = range(2_500, 3_500)
"""Deltas of a long answer: more than the two pages that a reader which stops may hold."""
TOKEN_BYTES = 20
"""No delta is longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job and the answer it must get."""

    number: int
    deltas: int
    gap_ms: int
    thoughts: int
    """So many of the deltas, the first ones, are reasoning."""
    lane: str = "interactive"
    tenant: str | None = None
    on_interrupt: str = "restart"
    cancelled_after_s: float | None = None
    """Somebody asks for its end so long after the submit."""
    readers: tuple[str, ...] = ("plain",)

    @property
    def id(self) -> str:
        """Its name."""
        return f"job-{self.number}"

    @property
    def prompt(self) -> str:
        """What tells the model server what to answer."""
        return f"{self.number}:{self.deltas}:{self.gap_ms}:{self.thoughts}"

    @property
    def request(self) -> dict[str, Any]:
        """The arguments of its submit."""
        return {
            "model": "continued" if self.on_interrupt == "continue" else "sim",
            "messages": [{"role": "user", "content": self.prompt}],
            "job_id": self.id,
            "lane": self.lane,
            "tenant": self.tenant,
            "on_interrupt": self.on_interrupt,
            # Room for the answer, and an end for one that has none.
            "max_output_bytes": TOKEN_BYTES * (self.deltas + 50),
        }


def draw_job(number: int, chance: random.Random) -> Job:
    """Job `number` of a scenario."""
    is_long = chance.random() < 0.02
    deltas = chance.choice(LONG) if is_long else chance.randint(1, 40)
    on_interrupt = chance.choices(("restart", "continue", "fail"), (7, 2, 1))[0]
    # No provider takes the beginning of a thought: one in five of those begins anew instead.
    speaks_at_once = on_interrupt == "continue" and chance.random() < 0.8
    lane, tenant = chance.choices((("interactive", None), ("batch", "acme"), ("batch", "other")), (8, 1, 1))[0]
    return Job(
        number=number,
        deltas=deltas,
        gap_ms=0 if is_long else chance.choice((0, 1, 5, 20, 40)),
        thoughts=0 if speaks_at_once else deltas // 5,
        lane=lane,
        tenant=tenant,
        on_interrupt=on_interrupt,
        cancelled_after_s=chance.random() * 0.8 if chance.random() < 0.1 else None,
        readers=_draw_readers(chance, is_long=is_long),
    )


def _draw_readers(chance: random.Random, *, is_long: bool) -> tuple[str, ...]:
    if is_long:
        return "plain", "stopping"
    if chance.random() < 0.05:  # a crowd that comes late
        return "plain", "late", "late again", "late as well", "resuming", "resuming too"
    return "plain", chance.choice(("late", "resuming", "from a snapshot", "stopping", "only the result", "with XREAD"))
