"""What `deltafan batch` shows."""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from deltafan import Limit, Producer, RedisUnavailable
from deltafan._workers import Worker
from deltafan.batch import Row
from deltafan_cli import _batch
from deltafan_cli._batch_tally import Tally
from deltafan_cli._estimate import Estimate
from deltafan_config import Catalogue

WORDS = "[/red] no quota [bold] left"
"""As a provider may put it: closing a tag that nobody opened is an error of markup."""


def request(**fields: Any) -> _batch.Request:
    given: dict[str, Any] = {
        "source": Path("in"),
        "output": Path("out"),
        "errors": None,
        "model": "m",
        "batch_id": None,
        "ordered": False,
        "window": 10,
        "tenant": None,
        "limit_cost": None,
        "as_json": False,
        "max_body_bytes": 1000,
    }
    return _batch.Request(**given | fields)


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Console:
    console = Console(file=io.StringIO(), record=True, width=200, soft_wrap=True)
    monkeypatch.setattr(_batch, "err", console)
    return console


def test_a_providers_words_are_shown_as_they_are(screen: Console) -> None:
    tally = Tally(rows=10, answered_before=0)
    tally.errors[WORDS] = tally.failed = 1
    screen.print(_batch._bar(tally.progress(), WORDS))
    _batch._summary(tally, "completed", request())
    assert screen.export_text().count(WORDS) == 2


class Redis:
    """What the reporter asks of a producer."""

    def __init__(self, *limits: Limit) -> None:
        self._limits = list(limits)
        self.told: list[Mapping[str, Any]] = []
        self.looks = 0

    async def limits(self) -> list[Limit]:
        return self._limits

    async def report_batch(self, batch_id: str, fields: Mapping[str, Any]) -> bool:  # noqa: ARG002  the producer's signature
        self.told.append(fields)
        return False


def limit(name: str) -> Limit:
    return Limit(
        name=name,
        requests_per_minute=60,
        tokens_per_minute=None,
        concurrency=None,
        requests=60,
        tokens=0,
        running=0,
        waiting={"interactive": 0, "batch": 7},
        closed_s=0.0,
        reason=None,
    )


def batch(held_up: str = "") -> Any:
    return SimpleNamespace(held_up=held_up, in_flight={})


async def why(
    redis: Redis, tally: Tally, held_up: str = "", *models: str, workers: Sequence[Worker] | None = ()
) -> str:
    async def living() -> Sequence[Worker]:
        redis.looks += 1
        if workers is None:
            raise RedisUnavailable("redis://here", "no answer within 1 s")
        return workers

    estimate = Estimate(Catalogue.load(None))
    for model in models:
        estimate.add(Row(1, "a", model, "chat", {"messages": []}))
    reporter = _batch.Reporter(request(), tally, batch(held_up), "b", cast(Producer, redis), estimate, living)
    waits = await reporter._tell()
    assert redis.told[-1]["waits"] == waits
    return waits


async def test_why_it_waits_is_told_of_what_the_batch_uses() -> None:
    tally = Tally(rows=10, answered_before=0, in_flight=5)
    redis = Redis(limit("openai"), limit("dashscope/qwen3.6-plus"), limit("dashscope/another"))
    assert await why(redis, tally, "", "qwen3.6-plus") == "7 wait for the limits of dashscope/qwen3.6-plus"
    assert (
        await why(redis, tally, "the lane is full", "openai/any") == "the lane is full; 7 wait for the limits of openai"
    )
    assert (await why(redis, tally, "", "only/workers-know")).count("7 wait") == 3


async def test_when_nothing_ends_it_tells_who_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_batch, "command_name", lambda: "deltafan")
    tally = Tally(rows=10, answered_before=0, in_flight=5)
    assert await why(Redis(), tally) == ""
    tally.last_end_s -= 60
    nobody = "no row has ended for 60 s: no worker has shown itself for 15 s, `deltafan worker` starts one"
    assert await why(Redis(), tally) == nobody
    assert (await why(Redis(limit("p")), tally, "", "p/m")).endswith(f"7 wait for the limits of p; {nobody}")
    one, two = Worker("a:1", 20, 20), Worker("b:1", 3, 20)
    assert (
        await why(Redis(), tally, workers=[one]) == "no row has ended for 60 s: 1 worker lives, 20 of 20 slots are busy"
    )
    assert "7 wait" in (told := await why(Redis(limit("p")), tally, "", "p/m", workers=[one, two]))
    assert told.endswith("2 workers live, 23 of 40 slots are busy")
    tally.in_flight = 0
    assert await why(Redis(), tally) == ""
    assert await why(Redis(), tally, "the lane is full") == f"the lane is full; {nobody}"


async def test_who_is_there_is_asked_only_when_nothing_ends_and_need_not_be_known() -> None:
    tally = Tally(rows=10, answered_before=0, in_flight=5)
    redis = Redis(limit("p"))
    assert await why(redis, tally, workers=None) == ""
    assert redis.looks == 0
    tally.last_end_s -= 60
    told = await why(redis, tally, "", "p/m", workers=None)
    assert (told, redis.looks) == ("7 wait for the limits of p; no row has ended for 60 s", 1)


def test_the_summary_tells_latencies_apart(screen: Console) -> None:
    tally = Tally(rows=1, answered_before=0)
    tally.latency.add(30.0)
    tally.model_latency.add(0.25)
    _batch._summary(tally, "completed", request())
    shown = screen.export_text()
    assert re.search(r"latency +p50 30 s", shown)
    assert re.search(r"of the model +p50 0.25 s", shown)
