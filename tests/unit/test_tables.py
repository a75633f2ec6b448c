from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console
from rich.table import Table

from deltafan import UsageRecord
from deltafan_cli._models import model_rows, models_table
from deltafan_cli._view import usage_table
from deltafan_config import Catalogue

RECORD = UsageRecord(
    job_id="2785095e5267b2f9bd457a9de627ad97",
    call_id="c",
    attempt=1,
    attempt_no=1,
    provider="dashscope",
    model="qwen3-omni-flash",
    api="chat",
    outcome="completed",
    source="provider",
    input_tokens=12_345,
    output_tokens=222,
    cost=0.00123,
    currency="USD",
    duration_ms=123_456,
)


def lines(table: Table, width: int) -> list[str]:
    console = Console(file=StringIO(), width=width, soft_wrap=True)
    console.print(table)
    assert isinstance(console.file, StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_catalogue_fits_with_every_name_and_every_missing_key_whole(width: int) -> None:
    rows = model_rows(Catalogue.load(), {"OPENAI_API_KEY": "k"})
    header, *shown = lines(models_table(rows, width=width), width)
    assert max(map(len, shown)) <= width
    for row, line in zip(rows, shown, strict=True):
        assert line.startswith(f"{row['model']} ")
        assert "  yes" in line or "  set DASHSCOPE_API_KEY" in line or "  set DEEPSEEK_API_KEY" in line
    assert any(line.endswith("0.15/0.6 USD") for line in shown)
    assert ("api" in header) == (width >= 100)


def test_the_ledger_fits_a_narrow_terminal_and_is_whole_on_a_wide_one() -> None:
    thinking = replace(RECORD, reasoning_tokens=100)
    header, *shown = lines(usage_table([RECORD, thinking], width=80), 80)
    assert header.split() == ["job", "model", "outcome", "input", "output", "cost", "seconds"]
    assert shown[0].split() == ["2785095e…", RECORD.model, "completed", "12345", "222", "0.001230", "USD", "123.46"]
    assert max(map(len, shown)) <= 80
    header, *shown = lines(usage_table([RECORD, thinking], width=120), 120)
    assert shown[0].startswith(RECORD.job_id)
    assert "reasoning" in header
    assert "cached" not in header, "nothing was"


def test_a_short_id_is_shown_whole_on_any_terminal() -> None:
    assert lines(usage_table([replace(RECORD, job_id="order-17")], width=80), 80)[1].startswith("order-17 ")
