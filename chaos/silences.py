"""How long readers were held up: from a fault that struck to the next event of whoever waited for one."""

from bisect import bisect_right
from dataclasses import dataclass, field

BOUND_S = 10.0
"""Whoever is held up for longer is stuck. Some faults last for 3 s themselves, and a lease for 2 s."""
MIXED_BOUND_S = 30.0
"""The same where faults overlap: the next may hold a reader up before it has recovered from the last."""
_NOTEWORTHY_S = 0.1


@dataclass
class Recovery:
    """Silences of readers, and the moments of faults, all on one clock."""

    strikes: list[float] = field(default_factory=list)
    _silences: list[tuple[float, float, str]] = field(default_factory=list)

    def heard(self, job_id: str, since: float, now: float) -> None:
        """A reader has an event at last."""
        if now - since > _NOTEWORTHY_S:
            self._silences.append((since, now, job_id))

    def worst(self) -> tuple[float, str]:
        """The longest time from a fault to the end of a silence that it fell into, and the job that was silent.

        The fault's own length counts: a server that is paused for two seconds holds its readers up for those too.
        """
        strikes, worst = sorted(self.strikes), (0.0, "")
        for since, until, job_id in self._silences:
            index = bisect_right(strikes, since)
            if index < len(strikes):
                worst = max(worst, (until - strikes[index], job_id))
        return worst
