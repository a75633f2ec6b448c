"""`deltafan batch`: a file of prompts in, a file of answers out."""

import asyncio
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import aclosing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.live import Live
from rich.table import Table

from deltafan import Consumer, InvalidRequest, Producer
from deltafan.batch import Batch, BatchFiles, Outcome
from deltafan_cli._view import err, out, print_json

EXIT_PARTLY = 3
REPORT_S = 2.0
_SAMPLES = 20_000
"""Latencies that the percentiles are taken from; more would only cost memory."""


@dataclass(slots=True)
class Tally:
    """How far a run is."""

    rows: int
    answered_before: int
    answered: int = 0
    failed: int = 0
    output_tokens: int = 0
    input_tokens: int = 0
    cost: float = 0.0
    currency: str = ""
    in_flight: int = 0
    started_s: float = field(default_factory=time.monotonic)
    errors: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        """Count a row."""
        if outcome.is_answer:
            self.answered += 1
        else:
            self.failed += 1
            self.errors[outcome.error_code or "unknown"] += 1
        if len(self.seconds) < _SAMPLES:
            self.seconds.append(outcome.seconds)
        if (usage := outcome.generation.usage) is not None:
            self.input_tokens += usage.input_tokens or 0
            self.output_tokens += usage.output_tokens or 0
            self.cost += usage.cost or 0.0
            self.currency = usage.currency or self.currency

    def progress(self) -> dict[str, Any]:
        """The figures, as other machines and `--json` get them."""
        elapsed_s = max(time.monotonic() - self.started_s, 1e-6)
        ended = self.answered + self.failed
        left = self.rows - self.answered_before - ended
        return {
            "rows": self.rows,
            "answered": self.answered_before + self.answered,
            "failed": self.failed,
            "running": self.in_flight,
            "tokens_per_s": round(self.output_tokens / elapsed_s, 1),
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "cost": round(self.cost, 6),
            "currency": self.currency,
            "left_s": round(left * elapsed_s / ended) if ended and left else 0,
        }

    def percentile(self, percent: float) -> float:
        """Seconds from submit to end, by nearest rank."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))] if ordered else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked for on the command line."""

    source: Path | None
    """None: standard input."""
    output: Path | None
    errors: Path | None
    model: str | None
    batch_id: str | None
    ordered: bool
    window: int
    tenant: str | None
    limit_cost: float | None
    as_json: bool


def check_batch(request: Request) -> int:
    """Read everything, send nothing."""
    with _opened(request) as files:
        left = files.rows - files.answered
        out.print(f"{files.rows:,} rows, all usable; {left:,} without an answer; batch {files.batch_id}")
    return 0


async def run_batch(request: Request, producer: Producer, consumer: Consumer) -> int:
    """Run what has no answer yet. Returns the exit code."""
    with _opened(request) as files:
        tally = Tally(files.rows, files.answered)
        batch = Batch(
            producer,
            consumer,
            batch_id=files.batch_id,
            window=request.window,
            tenant=request.tenant,
            job_id=files.job_id,
        )
        err.print(f"batch {files.batch_id}: {files.rows:,} rows, {files.answered:,} answered before", markup=False)
        state = "completed"
        async with asyncio.TaskGroup() as tasks:
            reporting = tasks.create_task(_report(tally, batch, producer, files.batch_id, request))
            async with aclosing(batch.run(files.pending(), ordered=request.ordered)) as outcomes:
                async for outcome in outcomes:
                    files.write(outcome)
                    tally.add(outcome)
                    if request.limit_cost is not None and tally.cost >= request.limit_cost:
                        state = "stopped at the limit of its cost"
                        batch.stop()
            reporting.cancel()
        is_whole = tally.answered_before + tally.answered == tally.rows
        if batch.cancelled:
            state = "cancelled"
        await producer.report_batch(files.batch_id, {**tally.progress(), "status": state})
    _summary(tally, state, request)
    return 0 if is_whole else EXIT_PARTLY


@contextmanager
def _opened(request: Request) -> Iterator[BatchFiles]:
    with TemporaryDirectory(prefix="deltafan-batch-") as folder:
        source, output = request.source, request.output
        if source is not None and not source.is_file():
            raise InvalidRequest("input", f"there is no file {source}")
        if source is None:
            source = Path(folder) / "input.jsonl"
            with source.open("wb") as spool:
                shutil.copyfileobj(sys.stdin.buffer, spool)
        target = output or Path(folder) / "output.jsonl"
        errors = request.errors or (
            output.with_name(output.name + ".errors") if output else Path(folder) / "errors.jsonl"
        )
        with BatchFiles.open(source, target, errors, model=request.model, batch_id=request.batch_id) as files:
            yield files
        if output is None:
            with target.open("rb") as answers:
                shutil.copyfileobj(answers, sys.stdout.buffer)


async def _report(tally: Tally, batch: Batch, producer: Producer, batch_id: str, request: Request) -> None:
    """Tell the terminal and other machines how far it is; heed a cancel from either."""
    with Live(console=err, auto_refresh=False, transient=True) if err.is_terminal else nullcontext() as live:
        while True:
            tally.in_flight = len(batch.in_flight)
            progress = tally.progress()
            if live is not None:
                live.update(_bar(progress), refresh=True)
            elif not request.as_json:
                err.print(_line(progress), markup=False)
            if await producer.report_batch(batch_id, {**progress, "status": "running"}):
                await batch.cancel()
            await asyncio.sleep(REPORT_S)


def _line(progress: Mapping[str, Any]) -> str:
    ended = progress["answered"] + progress["failed"]
    parts = [f"{ended:,} of {progress['rows']:,} ({progress['failed']:,} failed, {progress['running']:,} running)"]
    parts.append(f"{progress['tokens_per_s']:,} tokens/s")
    if progress["currency"]:
        parts.append(f"{progress['cost']:.4f} {progress['currency']}")
    if progress["left_s"]:
        parts.append(f"about {progress['left_s']:,} s left")
    return ", ".join(parts)


def _bar(progress: Mapping[str, Any]) -> Table:
    width = 30
    done = int(width * (progress["answered"] + progress["failed"]) / max(1, progress["rows"]))
    table = Table.grid(padding=(0, 1))
    table.add_row("█" * done + "░" * (width - done), _line(progress))
    return table


def _summary(tally: Tally, state: str, request: Request) -> None:
    progress = tally.progress()
    latencies = {f"p{percent}_s": round(tally.percentile(percent), 3) for percent in (50, 90, 99)}
    if request.as_json:
        report = {**progress, **latencies, "status": state, "errors": dict(tally.errors)}
        target = sys.stdout if request.output is not None else sys.stderr
        print(json.dumps(report), file=target)
        return
    table = Table(box=None, show_header=False, pad_edge=False, title=f"batch {state}", title_justify="left")
    table.add_row("answered", f"{progress['answered']:,} of {tally.rows:,}")
    table.add_row(
        "failed", f"{tally.failed:,}" + "".join(f"  {code}: {n:,}" for code, n in tally.errors.most_common(5))
    )
    table.add_row("tokens", f"{tally.input_tokens:,} in, {tally.output_tokens:,} out")
    table.add_row("cost", f"{tally.cost:.6f} {tally.currency}" if tally.currency else "no price in the catalogue")
    table.add_row("latency", ", ".join(f"{name.removesuffix('_s')} {value:g} s" for name, value in latencies.items()))
    err.print(table)


async def batch_status(producer: Producer, batch_id: str | None, *, as_json: bool) -> int:
    """Show what is known of one batch, or of all."""
    found = await producer.batches()
    if batch_id is not None:
        found = {batch_id: found[batch_id]} if batch_id in found else {}
        if not found:
            err.print(f"nothing is known of batch {batch_id}: it never ran here, or it is too long ago", markup=False)
            return 1
    if as_json:
        for id_, fields in found.items():
            print_json({"id": id_, **fields})
        return 0
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("batch", "status", "answered", "failed", "running", "cost", "heard of"):
        table.add_column(name, no_wrap=True)
    for id_, fields in found.items():
        ago_s = time.time() - float(fields.get("heard_s", 0))
        counts = [
            f"{fields.get('answered', '0')} of {fields.get('rows', '?')}",
            fields.get("failed", "0"),
            fields.get("running", "0"),
        ]
        status = fields.get("status", "?")
        if status == "running" and ago_s > 10 * REPORT_S:
            status = "interrupted"
        table.add_row(
            id_, status, *counts, f"{fields.get('cost', '0')} {fields.get('currency', '')}", f"{ago_s:.0f} s ago"
        )
    out.print(table)
    return 0
