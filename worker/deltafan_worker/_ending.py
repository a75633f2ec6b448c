"""How a run ended, and the records that are written of it: terminal entry, result, usage note."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import orjson

from deltafan._events import CANCELLED, COMPLETED, CONTENT, FAILED, REASONING, REFUSAL, Failure
from deltafan._fold import Generation
from deltafan._position import Position
from deltafan._usage import CallOutcome, UsageRecord
from deltafan_worker._background import ResponseNote
from deltafan_worker._decoder import Decoder
from deltafan_worker._log import AttemptLog
from deltafan_worker._plain import plain
from deltafan_worker._route import Route
from deltafan_worker._usage import cost, estimate, normalise
from deltafan_worker._writer import Sealed


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """The outcome of a run. A value, since it crosses processes: the terminal entry carries it."""

    status: str
    """completed, failed or cancelled."""
    finish_reason: str | None = None
    failure: Failure | None = None
    cancel_reason: str | None = None

    @classmethod
    def completed(cls, finish_reason: str) -> "Ending":
        """The model has said all it wanted."""
        return cls(status=COMPLETED, finish_reason=finish_reason)

    @classmethod
    def failed(cls, code: str, message: str, *, retryable: bool = False) -> "Ending":
        """There will be no whole answer."""
        return cls(status=FAILED, failure=Failure(code, message, retryable))

    @classmethod
    def cancelled(cls, reason: str) -> "Ending":
        """Somebody asked for the end."""
        return cls(status=CANCELLED, cancel_reason=reason)

    def data(self, usage: UsageRecord | None) -> dict[str, Any]:
        """The terminal entry's data."""
        fields: dict[str, Any] = {}
        if self.status == COMPLETED:
            fields["finish_reason"] = self.finish_reason
        elif self.failure is not None:
            fields |= {"code": self.failure.code, "message": self.failure.message, "retryable": self.failure.retryable}
        else:
            fields["reason"] = self.cancel_reason
        return fields | ({"usage": usage.to_json()} if usage else {})


@dataclass(slots=True, kw_only=True)
class CallMeter:
    """Measures one model call while it runs."""

    job_id: str
    call_id: str
    lane: str
    tenant: str | None
    worker: str
    submitted_at_ms: int | None
    route: Route
    started_at_ms: int | None = None
    """Unix time of the request; None when none was sent."""
    started_s: float = 0.0
    """The monotonic clock at that moment."""
    first_delta_s: float | None = None
    ended_s: float | None = None
    deltas: int = 0
    raw_usage: Mapping[str, Any] | None = None
    response_id: str | None = None
    was_taken: bool = False
    """The provider took the request, and the call failed: another one needs a record of its own."""

    def note(self, decoder: Decoder) -> None:
        """What a decoder has heard of usage and id."""
        self.raw_usage, self.response_id = plain(decoder.usage), decoder.response_id

    @property
    def response(self) -> ResponseNote | None:
        """Where the answer can be found again if we leave it; whoever reads it to its end bills the call."""
        if not self.route.in_background or self.response_id is None:
            return None
        return ResponseNote(self.call_id, self.route.provider, self.response_id)

    def record(
        self,
        outcome: CallOutcome,
        *,
        attempt: int,
        attempt_no: int,
        output_bytes: int = 0,
        finish_reason: str | None = None,
    ) -> UsageRecord:
        """The usage record as things stand; without the provider's own, an estimate of what was streamed."""
        return UsageRecord(
            job_id=self.job_id,
            call_id=self.call_id,
            attempt=attempt,
            attempt_no=attempt_no,
            provider=self.route.provider,
            model=self.route.model,
            api=self.route.api,
            outcome=outcome,
            finish_reason=finish_reason,
            lane=self.lane,
            tenant=self.tenant,
            worker=self.worker,
            response_id=self.response_id,
            deltas=self.deltas,
            started_at_ms=self.started_at_ms,
            queued_ms=_since(self.submitted_at_ms, self.started_at_ms),
            first_delta_ms=self._elapsed_ms(self.first_delta_s),
            duration_ms=self._elapsed_ms(self.ended_s),
            raw=self.raw_usage,
            **self._used(output_bytes),
        )

    def _used(self, output_bytes: int) -> dict[str, Any]:
        if self.raw_usage is not None:
            counts, source = normalise(self.raw_usage), "provider"
        elif output_bytes:
            counts, source = estimate(output_bytes), "estimated"
        else:
            return {"source": "none", "cost_note": "nobody has told what was used"}
        price = cost(counts, self.route.price)
        costs = {"cost": price.amount, "currency": price.currency, "cost_note": price.note}
        return {"source": source, **costs, **asdict(counts)}

    def _elapsed_ms(self, until_s: float | None) -> int | None:
        return None if until_s is None else round((until_s - self.started_s) * 1000)


def _since(start_ms: int | None, end_ms: int | None) -> int | None:
    return None if start_ms is None or end_ms is None else max(0, end_ms - start_ms)


def members(record: Mapping[str, Any]) -> str:
    """A JSON object's members without its braces, for a script that puts its own before them."""
    return orjson.dumps(record).decode()[1:-1]


def seal(ending: Ending, log: AttemptLog, usage: UsageRecord | None, position: Position) -> Sealed:
    """The last records of a job: what its attempt has produced, and how it ended, at `position`."""
    pcm, transcript = log.audio()
    generation = Generation(
        status=ending.status,
        position=position,
        content=log.text(CONTENT),
        reasoning=log.text(REASONING),
        refusal=log.text(REFUSAL),
        tool_calls=log.tool_calls(),
        pcm=pcm,
        transcript=transcript,
        annotations=log.annotations(),
        finish_reason=ending.finish_reason,
        usage=usage,
        failure=ending.failure,
        cancel_reason=ending.cancel_reason,
        attempt_no=usage.attempt_no if usage else 0,
        model=usage.model if usage else None,
        provider=usage.provider if usage else None,
        api=usage.api if usage else None,
    )
    return _sealed(ending, generation, usage)


def seal_without_answer(ending: Ending, usage: UsageRecord | None, position: Position) -> Sealed:
    """The same of an answer that can not be written: its bill is."""
    usage = replace(usage, outcome="failed", finish_reason=None, raw=None) if usage else None
    generation = Generation(status=ending.status, position=position, failure=ending.failure, usage=usage)
    return _sealed(ending, generation, usage)


def _sealed(ending: Ending, generation: Generation, usage: UsageRecord | None) -> Sealed:
    data = orjson.dumps(ending.data(usage))
    note = orjson.dumps(usage.to_json()) if usage else b""
    return Sealed(ending.status, data, orjson.dumps(generation.to_json()), note)
