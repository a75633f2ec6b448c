"""The usage record: the bill of one model call.

Names follow the OpenTelemetry GenAI vocabulary. Cached and cache-written tokens are inside the input, reasoning
and audio tokens inside the output. A count that nobody reported is None, which is not the same as 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

UsageSource = Literal["provider", "estimated", "none"]
"""`provider`: reported upstream. `estimated`: counted by us from what was streamed. `none`: nobody knows."""

CallOutcome = Literal["completed", "failed", "cancelled", "interrupted", "handed_over", "lost"]
"""How one model call ended. `interrupted`: cut after its first delta, a new attempt followed.
`handed_over`: given up at a worker's shutdown. `lost`: its worker vanished, so nothing more is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageRecord:
    """What one model call used and cost. `UsageRecord.from_json(r.to_json()) == r`."""

    job_id: str
    call_id: str
    """The model call; one record per call, however many attempts replay it."""
    attempt: int
    """First part of the positions of the attempt that made the call."""
    attempt_no: int
    """1, 2, 3 … among the job's model runs."""
    provider: str
    model: str
    """The name the provider was asked for."""
    api: str
    outcome: CallOutcome
    source: UsageSource
    input_tokens: int | None = None
    output_tokens: int | None = None
    total_tokens: int | None = None
    cached_input_tokens: int | None = None
    cache_write_tokens: int | None = None
    reasoning_tokens: int | None = None
    input_audio_tokens: int | None = None
    output_audio_tokens: int | None = None
    cost: float | None = None
    """In `currency`, from the catalogue's prices; None when it can not be told, `cost_note` says why."""
    currency: str | None = None
    cost_note: str | None = None
    finish_reason: str | None = None
    lane: str | None = None
    tenant: str | None = None
    worker: str | None = None
    response_id: str | None = None
    deltas: int = 0
    started_at_ms: int | None = None
    """Unix time when the upstream request was sent."""
    queued_ms: int | None = None
    """From submit to that moment."""
    first_delta_ms: int | None = None
    """From the upstream request to the first delta."""
    duration_ms: int | None = None
    """From the upstream request to the end."""
    raw: Mapping[str, Any] | None = field(default=None, hash=False)
    """The provider's own usage object, untouched."""

    def to_json(self) -> dict[str, Any]:
        """A JSON object without the fields that are None."""
        return {name: value for name in _FIELDS if (value := getattr(self, name)) is not None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "UsageRecord":
        """Read `to_json`'s object; unknown fields, as a later version may write, are skipped."""
        return cls(**{name: value for name, value in data.items() if name in _FIELDS})


_FIELDS = tuple(f.name for f in fields(UsageRecord))
