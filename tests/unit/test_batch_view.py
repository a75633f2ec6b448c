"""What `deltafan batch` shows."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from deltafan_cli import _batch
from deltafan_cli._batch_tally import Tally

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
