"""`deltafan batch`: a file of prompts in, a file of answers out."""

import asyncio
import json
import shutil
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, aclosing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.live import Live
from rich.table import Table
from rich.text import Text

from deltafan import Consumer, InvalidRequest, JobNotFound, Limit, Producer, RedisUnavailable
from deltafan._background import background
from deltafan._workers import SHOWN_S, Worker
from deltafan.batch import Batch, BatchFiles
from deltafan_cli._batch_tally import Tally
from deltafan_cli._commands import command_name
from deltafan_cli._estimate import Estimate, money
from deltafan_cli._view import err, out, print_json
from deltafan_config import Catalogue

EXIT_PARTLY = 3
REPORT_S = 2.0
UNHEARD_S = 10 * REPORT_S
"""A runner that has said nothing for so long is dead, or its machine is cut off."""
Workers = Callable[[], Awaitable[Sequence[Worker]]]
"""Gives those that live."""
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked for on the command line."""

    source: Path | None
    """None: standard input."""
    output: Path | None
    """None: standard output."""
    errors: Path | None
    model: str | None
    batch_id: str | None
    ordered: bool
    window: int
    tenant: str | None
    limit_cost: float | None
    as_json: bool
    max_body_bytes: int


def check_batch(request: Request, catalogue: Catalogue) -> int:
    """Read everything, send nothing."""
    estimate = Estimate(catalogue)
    with opened(request, estimate, check_only=True) as files:
        rows, answered, batch_id = files.rows, files.answered, files.batch_id
    if request.as_json:
        print_json({"id": batch_id, "rows": rows, "answered": answered, "estimate": estimate.to_json()})
        return 0
    out.print(f"{rows:,} rows, all usable; {rows - answered:,} without an answer; batch {batch_id}", markup=False)
    for line in estimate.lines():
        out.print(line, markup=False)
    return 0


async def run_batch(
    request: Request,
    files: BatchFiles,
    estimate: Estimate,
    producer: Producer,
    consumer: Consumer,
    workers: Workers,
) -> int:
    """Run what has no answer yet. Returns the exit code."""
    tally, state = Tally.of(files, request.limit_cost, estimate.mean()), "interrupted"
    batch = Batch(
        producer,
        consumer,
        batch_id=files.batch_id,
        window=lambda: min(request.window, tally.affords()),
        tenant=request.tenant,
        tries=files.tries,
    )
    await producer.report_batch(files.batch_id, _fields(tally, "running"), is_first=True)
    err.print(f"batch {files.batch_id}: {files.rows:,} rows, {files.answered:,} answered before", markup=False)
    for line in estimate.lines():
        err.print(line, markup=False)
    reporter = Reporter(request, tally, batch, files.batch_id, producer, estimate, workers)
    try:
        async with background(reporter.run(), "report"):
            state = await _run(batch, files, tally, request)
    except asyncio.CancelledError:
        err.print("interrupted; the same command goes on from here")
        err.print(f"deltafan batch cancel {files.batch_id} ends the rows that wait", markup=False)
        raise
    finally:
        with suppress(RedisUnavailable):
            await producer.report_batch(files.batch_id, _fields(tally, state))
    _summary(tally, state, request)
    return 0 if tally.is_whole else EXIT_PARTLY


async def _run(batch: Batch, files: BatchFiles, tally: Tally, request: Request) -> str:
    async with aclosing(batch.run(files.pending(), ordered=request.ordered)) as outcomes:
        async for outcome in outcomes:
            if request.output is not None:
                files.write(outcome)
            else:  # whoever reads it may be slow, and must not hold up the rest
                await asyncio.to_thread(files.write, outcome)
            tally.add(outcome)
            if tally.is_over:  # else it stops by its window: what is in flight may yet show that there is room
                await batch.withdraw()
    if tally.is_whole:
        return "completed"
    if batch.cancelled:
        return "cancelled"
    return "stopped at the limit of its cost" if tally.left else "completed with failures"


@contextmanager
def opened(request: Request, estimate: Estimate, *, check_only: bool = False) -> Iterator[BatchFiles]:
    """The batch's files, all of them read and checked."""
    output = request.output
    if output is not None and output.suffix == ".gz":
        raise InvalidRequest("output", f"{output} would hold plain text; name it without .gz")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="deltafan-batch-")))
        with err.status("reading and checking the rows") if err.is_terminal else nullcontext():
            source, name = _source(request.source, folder)
            files = stack.enter_context(
                BatchFiles.open(
                    source,
                    output or sys.stdout.buffer,
                    request.errors or (output.parent / f"{output.name}.errors" if output else sys.stderr.buffer),
                    model=request.model,
                    batch_id=request.batch_id,
                    max_body_bytes=request.max_body_bytes,
                    check_only=check_only,
                    on_row=estimate.add,
                    source_name=name,
                )
            )
        if request.limit_cost is not None and estimate.unpriced:
            model = next(iter(estimate.unpriced))
            raise InvalidRequest("limit_cost", f"model {model} has no price in the catalogue, so it can not hold")
        yield files


def _source(given: Path | None, folder: Path) -> tuple[Path, str]:
    """The input as a file, since it is read twice, and what to call it."""
    if given is not None and given.is_file():
        return given, str(given)
    if given is not None and (given.is_dir() or not given.exists()):
        raise InvalidRequest("input", f"there is no file {given}")
    with given.open("rb") if given is not None else nullcontext(sys.stdin.buffer) as pipe:
        head = pipe.read(len(_GZIP))
        name = "input.jsonl.gz" if head == _GZIP else "input.jsonl"
        with (folder / name).open("wb") as spool:
            spool.write(head)
            shutil.copyfileobj(pipe, spool)
    return folder / name, "standard input" if given is None else str(given)


class Reporter:
    """Tells the terminal and other machines how far a batch is, and heeds a cancel from either."""

    def __init__(
        self,
        request: Request,
        tally: Tally,
        batch: Batch,
        batch_id: str,
        producer: Producer,
        estimate: Estimate,
        workers: Workers,
    ) -> None:
        self._as_json, self._tally, self._batch = request.as_json, tally, batch
        self._batch_id, self._producer, self._estimate, self._workers = batch_id, producer, estimate, workers

    async def run(self) -> None:
        """Until it is cancelled."""
        with Live(console=err, auto_refresh=False, transient=True) if err.is_terminal else nullcontext() as live:
            while True:
                self._tally.in_flight = len(self._batch.in_flight)
                waits = await self._tell()
                if live is not None:
                    live.update(_bar(self._tally.progress(), waits), refresh=True)
                elif not self._as_json:
                    err.print(_line(self._tally.progress(), waits), markup=False)
                await asyncio.sleep(REPORT_S)

    async def _tell(self) -> str:
        """Report to Redis. Returns why the batch waits, if it does."""
        waits = "Redis can not be reached; waiting"
        with suppress(RedisUnavailable):
            limits = [limit for limit in await self._producer.limits() if self._estimate.uses(limit.name)]
            waits = "; ".join(filter(None, (self._batch.held_up, _waits(limits), await self._quiet())))
            fields = {**_fields(self._tally, "running"), "waits": waits}
            if await self._producer.report_batch(self._batch_id, fields):
                await self._batch.cancel()
        return waits

    async def _quiet(self) -> str:
        """For how long no row has ended, and who is there, if that can be known."""
        if not (self._tally.in_flight or self._batch.held_up) or self._tally.quiet_s <= UNHEARD_S:
            return ""
        told = f"no row has ended for {self._tally.quiet_s:,.0f} s"
        with suppress(RedisUnavailable):  # asked over a connection of its own, whose loss must not be the report's
            told += f": {_present(await self._workers())}"
        return told


def _fields(tally: Tally, status: str) -> dict[str, Any]:
    progress = tally.progress()
    return {**progress, "cost": json.dumps(progress["cost"]), "status": status, "waits": ""}


def _waits(limits: list[Limit]) -> str:
    """Why batch jobs wait, if they do."""
    reasons = []
    for limit in limits:
        waiting = limit.waiting["batch"]
        if limit.closed_s > 0 and limit.reason is not None:
            reasons.append(f"{limit.name} is paused, trying again in {limit.closed_s:.0f} s: {limit.reason}")
        elif limit.closed_s > 0:
            reasons.append(f"{limit.name} has asked for less, going on in {limit.closed_s:.0f} s")
        elif waiting:
            reasons.append(f"{waiting:,} wait for the limits of {limit.name}")
    return "; ".join(reasons)


def _present(workers: Sequence[Worker]) -> str:
    """Who is there to run the rows."""
    if not workers:
        return f"no worker has shown itself for {SHOWN_S:.0f} s, `{command_name()} worker` starts one"
    live = "1 worker lives" if len(workers) == 1 else f"{len(workers):,} workers live"
    running, slots = sum(worker.running for worker in workers), sum(worker.slots for worker in workers)
    return f"{live}, {running:,} of {slots:,} slots are busy"


def _line(progress: Mapping[str, Any], waits: str) -> str:
    ended = progress["answered"] + progress["failed"]
    parts = [f"{ended:,} of {progress['rows']:,} ({progress['failed']:,} failed, {progress['in_flight']:,} in flight)"]
    parts.append(f"{progress['tokens_per_s']:,} tokens/s")
    if progress["cost"]:
        parts.append(money(progress["cost"]))
    if progress["left_s"]:
        parts.append(f"about {progress['left_s']:,} s left")
    if waits:
        parts.append(waits)
    return ", ".join(parts)


def _bar(progress: Mapping[str, Any], waits: str) -> Table:
    width = 30
    done = int(width * (progress["answered"] + progress["failed"]) / max(1, progress["rows"]))
    table = Table.grid(padding=(0, 1))
    # A provider's words are in it, which may look like markup.
    table.add_row("█" * done + "░" * (width - done), Text(_line(progress, waits)))
    return table


def _summary(tally: Tally, state: str, request: Request) -> None:
    progress = tally.progress()
    latencies, model_latencies = tally.latency.percentiles(), tally.model_latency.percentiles()
    if request.as_json:
        of_model = {f"model_{name}": value for name, value in model_latencies.items()}
        report = {**progress, **latencies, **of_model, "status": state, "errors": dict(tally.errors)}
        target = sys.stdout if request.output is not None else sys.stderr
        print(json.dumps(report), file=target)
        return
    table = Table(box=None, show_header=False, pad_edge=False, title=f"batch {state}", title_justify="left")
    table.add_row("answered", f"{progress['answered']:,} of {tally.rows:,}")
    kinds = "".join(f"  {code}: {n:,}" for code, n in tally.errors.most_common(5))
    table.add_row("failed", Text(f"{tally.failed:,}{kinds}"))
    table.add_row("tokens", f"{progress['input_tokens']:,} in, {progress['output_tokens']:,} out")
    table.add_row("cost", money(tally.cost) if tally.cost else "not known")
    for name, values in (("latency", latencies), ("of the model", model_latencies)):
        table.add_row(name, ", ".join(f"{key.removesuffix('_s')} {value:g} s" for key, value in values.items()))
    err.print(table)


async def batch_status(producer: Producer, batch_id: str | None, *, as_json: bool) -> int:
    """Show what is known of one batch, or of all."""
    found = await producer.batches()
    if batch_id is not None:
        found = {batch_id: found[batch_id]} if batch_id in found else {}
        if not found:
            return _nothing_known(batch_id)
    shown = {id_: _shown(fields) for id_, fields in found.items()}
    if as_json:
        for id_, fields in shown.items():
            print_json({"id": id_, **fields})
        return 0
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("batch", "status", "answered", "failed", "in flight", "cost", "heard of"):
        table.add_column(name, no_wrap=True)
    for id_, fields in shown.items():
        answered = f"{fields.get('answered', '0')} of {fields.get('rows', '?')}"
        counts = [fields.get("failed", "0"), fields.get("in_flight", "0")]
        table.add_row(id_, fields["status"], answered, *counts, money(fields["cost"]), f"{fields['ago_s']:.0f} s ago")
    out.print(table)
    for id_, fields in shown.items():
        if fields["status"] == "running" and fields.get("waits"):
            out.print(f"{id_}: {fields['waits']}", markup=False)
    return 0


def _shown(fields: Mapping[str, str]) -> dict[str, Any]:
    ago_s, status = float(fields["ago_s"]), fields.get("status", "?")
    if status == "running" and ago_s > UNHEARD_S:
        status = "interrupted"
    if status == "interrupted" and "cancel" in fields:
        status = "cancelled"
    return {**fields, "status": status, "cost": json.loads(fields.get("cost", "{}")), "ago_s": ago_s}


async def batch_cancel(producer: Producer, batch_id: str) -> int:
    """Ask for a batch's end."""
    try:
        ago_s = await producer.cancel_batch(batch_id)
    except JobNotFound:
        return _nothing_known(batch_id)
    out.print(f"batch {batch_id} is being stopped", markup=False)
    if ago_s > UNHEARD_S:
        err.print(
            f"its runner was last heard of {ago_s:,.0f} s ago; the rows that it left waiting are cancelled when their "
            "turn comes, those that run come to their end",
            markup=False,
        )
    return 0


def _nothing_known(batch_id: str) -> int:
    err.print(f"nothing is known of batch {batch_id}: it never ran here, or it is too long ago", markup=False)
    return 1
