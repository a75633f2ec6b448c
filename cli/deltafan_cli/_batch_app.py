"""The commands of `deltafan batch`."""

import signal
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deltafan import DeltafanError
from deltafan._workers import living_workers
from deltafan_cli._commands import AsJson, await_, consumer_of, producer_of, read_settings
from deltafan_config import Catalogue, Settings

if TYPE_CHECKING:
    from deltafan_cli._batch import Request

batch_app = typer.Typer(no_args_is_help=True, help="Many prompts from a file, through the batch lane.")


@batch_app.command("run")
def batch_run(
    source: Annotated[str, typer.Option("--input", "-i", help="JSON Lines, .gz too; - reads standard input.")],
    output: Annotated[
        str, typer.Option("--output", "-o", help="Answers, appended as they come; - for standard output.")
    ],
    errors: Annotated[
        Path | None, typer.Option(help="Failed rows; OUTPUT.errors unless told, or standard error.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="For rows that name none.")] = None,
    batch_id: Annotated[
        str | None, typer.Option("--id", help="An id of your own; else it is that of the input.")
    ] = None,
    ordered: Annotated[bool, typer.Option("--ordered", help="Answers in the order of the rows.")] = False,
    window: Annotated[int, typer.Option(min=1, max=100_000, help="Jobs in flight at most.")] = 2000,
    tenant: Annotated[str | None, typer.Option(help="Whom to bill; else the batch's id.")] = None,
    limit_cost: Annotated[
        float | None, typer.Option(min=0, help="Submit no more once all runs of it cost so much.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Read everything, send nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Answer every row. Started again, it goes on where it stopped, and calls no model twice for an answer it has.

    Rows are OpenAI's (custom_id, method, url, body) or short: prompt or messages. Exit code 3: some have no answer.
    """
    from deltafan_cli._batch import Request

    settings = read_settings()
    request = Request(
        source=None if source == "-" else Path(source),
        output=None if output == "-" else Path(output),
        errors=errors,
        model=model,
        batch_id=batch_id,
        ordered=ordered,
        window=window,
        tenant=tenant,
        limit_cost=limit_cost,
        as_json=as_json,
        max_body_bytes=settings.max_body_bytes,
    )
    with _ending_well():
        sys.exit(_check_or_run(request, settings, check=check))


def _check_or_run(request: "Request", settings: Settings, *, check: bool) -> int:
    from deltafan_cli._batch import check_batch, opened, run_batch
    from deltafan_cli._estimate import Estimate

    catalogue = Catalogue.load(settings.models)
    if check:
        return check_batch(request, catalogue)
    estimate = Estimate(catalogue)
    workers = partial(living_workers, settings.redis_url, prefix=settings.prefix)
    # What takes long and waits for nobody is done before there is an event loop, where Ctrl-C ends it at once.
    with opened(request, estimate) as files:

        async def work() -> int:
            async with producer_of(settings) as producer, consumer_of(settings) as consumer:
                return await run_batch(request, files, estimate, producer, consumer, workers)

        return await_(work())


@contextmanager
def _ending_well() -> Iterator[None]:
    """SIGTERM is Ctrl-C, and what a disk or a pipe says is a sentence."""
    from deltafan_cli._view import err

    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    except (DeltafanError, BrokenPipeError):
        raise
    except (OSError, sqlite3.Error) as error:
        name = getattr(error, "filename", None)
        why = getattr(error, "strerror", None) or str(error)
        err.print(f"{name}: {why}" if name else why, markup=False)
        err.print("once that is mended, the same command goes on from here")
        sys.exit(1)


@batch_app.command("status")
def batch_status(
    batch_id: Annotated[str | None, typer.Argument(help="One batch; all of them unless told.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show how far batches are, from any machine."""
    from deltafan_cli import _batch

    async def work(given: Settings) -> int:
        async with producer_of(given) as producer:
            return await _batch.batch_status(producer, batch_id, as_json=as_json)

    sys.exit(await_(work(read_settings())))


@batch_app.command("list")
def batch_list(as_json: AsJson = False) -> None:
    """List the batches that were heard of lately."""
    batch_status(None, as_json)


@batch_app.command("cancel")
def batch_cancel(batch_id: Annotated[str, typer.Argument(help="As `batch list` shows it.")]) -> None:
    """End a batch: no more rows are submitted, and those in flight are cancelled."""
    from deltafan_cli import _batch

    async def work(given: Settings) -> int:
        async with producer_of(given) as producer:
            return await _batch.batch_cancel(producer, batch_id)

    sys.exit(await_(work(read_settings())))
