"""How long the keys of a job live."""

from dataclasses import dataclass
from datetime import timedelta

_HOUR_MS = 3_600_000
_MARGIN_MS = _HOUR_MS
"""State outlives what refers to it by this much, so that nobody finds a record without its state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Lifetimes in ms, counted from the job's end, `queue_ms` from its submit: stream <= result <= state.

    State is what makes a repeated id the same job; it also outlives arq's record, or a job that ended would be run
    again by a worker that finds the record and no state.
    """

    stream_ms: int = _HOUR_MS
    result_ms: int = 24 * _HOUR_MS
    queue_ms: int = 24 * _HOUR_MS

    @property
    def state_ms(self) -> int:
        """For a job that has ended."""
        return max(self.result_ms, self.queue_ms) + _MARGIN_MS

    @property
    def live_ms(self) -> int:
        """For stream and state of a job that has not; renewed by its worker's heartbeat."""
        return self.queue_ms + _MARGIN_MS

    def with_ttl(self, ttl: timedelta | None) -> "Retention":
        """The retention of one job that asked for its own `ttl` of stream and result."""
        if ttl is None:
            return self
        result_ms = max(1, int(ttl.total_seconds() * 1000))
        return Retention(stream_ms=min(self.stream_ms, result_ms), result_ms=result_ms, queue_ms=self.queue_ms)

    @property
    def ended_ms(self) -> tuple[int, int, int]:
        """Lifetimes after the end, in the order of the job's keys: stream, result, state."""
        return self.stream_ms, self.result_ms, self.state_ms
