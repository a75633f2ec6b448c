"""What a limit of cost lets a batch do."""

from collections.abc import Mapping
from dataclasses import replace

import pytest

from deltafan import Failure, Generation, UsageRecord
from deltafan.batch import Outcome, Row
from deltafan_cli._batch_tally import Tally

ROW = Row(1, "a", "m", "chat", {})


def tally(limit_cost: float | None, guess: Mapping[str, float] | None = None, *, before: int = 0) -> Tally:
    return Tally(rows=1000, answered_before=before, limit_cost=limit_cost, guess=guess or {})


def usage_of(cost: float | None, currency: str) -> UsageRecord:
    return UsageRecord(
        job_id="j",
        call_id="c",
        attempt=1,
        attempt_no=1,
        provider="p",
        model="m",
        api="chat",
        outcome="completed",
        source="provider",
        cost=cost,
        currency=currency,
    )


def ended(cost: float | None, currency: str = "USD", *, failed: bool = False) -> Outcome:
    failure = Failure("server_error", "down", retryable=True) if failed else None
    generation = Generation(status="failed" if failed else "completed", usage=usage_of(cost, currency), failure=failure)
    return Outcome(ROW, "j-0", generation, 1.0)


@pytest.mark.parametrize(
    ("limit", "guess", "rows"),
    [
        (1.0, {}, 10),
        (1.0, {"USD": 0.01}, 10),
        (1.0, {"USD": 0.25}, 4),
        (1.0, {"USD": 0.01, "CNY": 0.5}, 2),
        (1.0, {"USD": 7.0}, 1),
        (0.0, {}, 0),
    ],
)
def test_before_any_row_has_ended_a_few_may_go_as_far_as_the_guess_allows(
    limit: float, guess: Mapping[str, float], rows: int
) -> None:
    assert tally(limit, guess).affords() == rows


def test_then_as_many_as_the_rest_pays_for_and_not_all_at_once() -> None:
    one, cost = tally(1.0, {"USD": 0.0001}), 1 / 128
    one.add(ended(cost))
    assert one.affords() == 12, "the first one may have been cheap"
    for _ in range(63):
        one.add(ended(cost))
    assert one.affords() == 64
    for _ in range(63):
        one.add(ended(cost, failed=True))
    assert (one.affords(), one.is_over) == (1, False)
    one.add(ended(cost / 2))
    assert (one.affords(), one.is_over) == (0, False)
    one.add(ended(cost / 2))
    assert (one.affords(), one.is_over) == (0, True)


def test_a_dear_row_closes_the_way_until_the_mean_is_small_again() -> None:
    one = tally(1.0)
    one.add(ended(0.6))
    assert (one.affords(), one.is_over) == (0, False)
    for _ in range(9):
        one.add(ended(0.001))
    assert one.affords() == int(0.391 / 0.0609)


def test_each_currency_has_the_limit_to_itself_and_what_is_free_has_none() -> None:
    one = tally(1.0)
    for _ in range(100):
        one.add(ended(None))
    assert one.affords() == 210
    for currency, cost in (("USD", 0.9), ("CNY", 0.2)):
        one.add(ended(cost, currency))
    assert one.affords() == int(0.1 / (0.9 / 102))
    assert tally(None).affords() > 1_000_000


def test_the_models_own_time_is_told_from_the_rows() -> None:
    one = tally(None)
    for milliseconds in range(1, 101):
        usage = replace(usage_of(None, "USD"), duration_ms=milliseconds * 10)
        one.add(Outcome(ROW, "j-0", Generation(status="completed", usage=usage), 30.0))
    assert one.latency.percentiles() == {"p50_s": 30.0, "p90_s": 30.0, "p99_s": 30.0}
    assert one.model_latency.percentiles() == {"p50_s": 0.51, "p90_s": 0.9, "p99_s": 0.99}
    assert tally(None).latency.percentiles()["p99_s"] == 0.0


def test_earlier_runs_count() -> None:
    one = tally(1.0, {"USD": 5.0}, before=10)
    one.cost["USD"] = 0.5
    assert one.affords() == 10
    one.cost["USD"] = 1.0
    assert one.is_over
