"""The commands."""

import asyncio
import errno
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from io import TextIOWrapper
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, NoReturn

import orjson
import typer

from deltafan import (
    DeltafanError,
    Event,
    Generation,
    InvalidPosition,
    InvalidRequest,
    JobEnded,
    Position,
    RedisUnavailable,
    UsageRecord,
    check_request,
)
from deltafan._background import background
from deltafan._request import check_job_id
from deltafan._workers import living_workers
from deltafan.batch import BadInput
from deltafan_cli._batch_app import batch_app
from deltafan_cli._commands import AsJson, await_, command_name, consumer_of, producer_of, read_settings
from deltafan_cli._view import EventPrinter, err, out, print_json, show_result, usage_table
from deltafan_config import Catalogue, CatalogueError, Settings, SettingsError

EXIT_FAILED = 1
EXIT_MISUSED = 2
EXIT_INTERRUPTED = 130

_PATIENCE_S = 3.0
"""After so long without an event a reader asks whether there are workers; they answer within ms."""

app = typer.Typer(
    name="deltafan",
    help="One model generation, published once, read by many.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(batch_app, name="batch")


def _checked_job_id(job_id: str | None) -> str | None:
    return None if job_id is None else check_job_id(job_id)


def _checked_position(position: str | None) -> str | None:
    return None if position is None else str(Position.parse(position))


# What is wrong with a command is said before a server is asked for anything.
JobId = Annotated[str, typer.Argument(help="The job's id, as submit printed it.", callback=_checked_job_id)]


def run() -> None:
    """Run the command line; every error that is not a defect ends in one sentence and an exit code."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an answer may hold what a terminal's encoding does not
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except (InvalidRequest, InvalidPosition, SettingsError, CatalogueError, BadInput) as error:
        _fail(str(error), EXIT_MISUSED)
    except RedisUnavailable as error:
        _fail(
            f"{error}\nStart a server and a worker with `deltafan dev`, or with `docker compose up`; "
            "another server is named by DELTAFAN_REDIS_URL."
        )
    except DeltafanError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has gone, `| head` for example.
        _drop_output()
        sys.exit(EXIT_FAILED)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        _drop_output()
        _fail(f"the output can not be written ({error.strerror})")


def _drop_output() -> None:
    """What was not written is not tried again when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int = EXIT_FAILED) -> NoReturn:
    err.print(message, style="red" if err.is_terminal else "", markup=False)
    sys.exit(code)


@app.callback(invoke_without_command=True)
def root(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """One model generation, published once, read by many."""
    if show_version:
        print(f"deltafan {version('deltafan')}")
        raise typer.Exit


@app.command()
def dev(
    demo: Annotated[bool, typer.Option("--demo", help="Submit one prompt and tail it with three consumers.")] = False,
    once: Annotated[bool, typer.Option("--once", help="With --demo: exit when that is done.")] = False,
    prompt: Annotated[str, typer.Option(help="What --demo asks.")] = "Tell me a short story about a lighthouse.",
    model: Annotated[str, typer.Option(help="Who answers. Any model of the catalogue whose key is set.")] = "smollm2",
) -> None:
    """Run everything on this machine: an embedded Valkey, a real local model and a worker. Ctrl-C stops all of it.

    Nothing needs to be installed or running beside it, and nothing is left when it ends.
    """
    if once and not demo:
        raise typer.BadParameter("there is nothing to do once without --demo", param_hint="--once")
    from deltafan_cli._dev import run_dev

    sys.exit(run_dev(demo=demo, once=once, prompt=prompt, model=model))


@app.command()
def worker(
    processes: Annotated[
        int | None, typer.Option(min=1, max=256, help="Worker processes; one saturates one core.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, max=10_000, help="Generations at once in each process.")
    ] = None,
    burst: Annotated[bool, typer.Option("--burst", help="Exit when no job is due.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Only tell whether a worker of this host is alive.")] = False,
) -> None:
    """Take jobs off the queue and publish their answers.

    SIGTERM or Ctrl-C drains: running jobs end or, when that takes too long, are handed over.
    """
    from deltafan_cli._worker import check_worker, run_workers

    given = {"processes": processes, "concurrency": concurrency}
    settings = Settings.model_validate(read_settings().model_dump() | {k: v for k, v in given.items() if v is not None})
    sys.exit(check_worker(settings) if check else run_workers(settings, burst=burst))


@app.command()
def submit(
    prompt: Annotated[str, typer.Argument(help="The user's message; - reads it from standard input.")],
    model: Annotated[str, typer.Option("--model", "-m", help="A model of the catalogue, or provider/model.")],
    system: Annotated[str | None, typer.Option(help="A system message before it.")] = None,
    api: Annotated[str, typer.Option(help="chat, responses or dashscope: what the provider is asked in.")] = "chat",
    body: Annotated[str | None, typer.Option(help="More of that API's request, as a JSON object.")] = None,
    job_id: Annotated[
        str | None,
        typer.Option(help="An id of your own; repeating it does not run the job again.", callback=_checked_job_id),
    ] = None,
    lane: Annotated[str, typer.Option(help="interactive or batch.")] = "interactive",
    deadline: Annotated[
        float | None, typer.Option(min=0.001, max=30 * 86_400, help="Seconds until the job fails if it has not ended.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print the answer as it comes.")] = False,
    as_json: AsJson = False,
) -> None:
    """Submit a prompt. Prints the job's id, or with --follow its answer. Ctrl-C stops following, not the job."""
    text = sys.stdin.read() if prompt == "-" else prompt
    messages = [{"role": "system", "content": system}] if system else []
    fields: dict[str, Any] = {"model": model, "messages": [*messages, {"role": "user", "content": text}]}
    fields |= {"lane": lane, "api": api}
    if body is not None:
        fields["body"] = _json_object(body)
    if deadline is not None:
        if not isfinite(deadline):
            raise InvalidRequest("deadline", "is not a number of seconds")
        fields["deadline"] = datetime.now(UTC) + timedelta(seconds=deadline)
    settings = read_settings()
    check_request(**fields, max_body_bytes=settings.max_body_bytes)
    sys.exit(await_(_submit(settings, fields | {"job_id": job_id}, follow=follow, as_json=as_json)))


async def _submit(settings: Settings, fields: dict[str, Any], *, follow: bool, as_json: bool) -> int:
    async with producer_of(settings) as producer:
        job = await producer.submit(**fields)
    if follow:
        return await _follow(settings, job.id, None, as_json=as_json, text_only=True)
    if as_json:
        print_json({"id": job.id, "created": job.created, "status": job.status})
    else:
        print(job.id)
    return 0


@app.command()
def tail(
    job_id: JobId,
    after: Annotated[
        str | None, typer.Option("--from", help="Go on after this position.", callback=_checked_position)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print a job's events from the start, then live, until its end. In a pipe: one line for each event."""
    sys.exit(await_(_follow(read_settings(), job_id, after, as_json=as_json, text_only=False)))


async def _follow(settings: Settings, job_id: str, after: str | None, *, as_json: bool, text_only: bool) -> int:
    printer = EventPrinter(as_json=as_json, text_only=text_only)
    status = ""
    async with _waiting(settings, job_id, "tail") as waiting, consumer_of(settings) as consumer:
        async with consumer.tail(job_id, after=after) as events:
            async for event in events:
                waiting.cancel()
                printer.show(event)
                status = event.type
                if text_only and not as_json and not out.is_terminal and (why := _why_not(event)):
                    err.print(f"job {job_id} {why}", markup=False)
    return 0 if status == "completed" else EXIT_FAILED


@asynccontextmanager
async def _waiting(settings: Settings, job_id: str, command: str) -> AsyncIterator["asyncio.Task[None]"]:
    """Say what a reader can not see: that nobody is there to run the job, and that Ctrl-C has not ended it."""
    try:
        async with background(_say_when_nobody_works(settings), "nobody-works") as waiting:
            yield waiting
    except asyncio.CancelledError:
        again, end = f"{command_name()} {command} {job_id}", f"{command_name()} cancel {job_id}"
        err.print(f"\nStopped reading; job {job_id} goes on. `{again}` returns to it, `{end}` ends it.", markup=False)
        raise


async def _say_when_nobody_works(settings: Settings) -> None:
    await asyncio.sleep(_PATIENCE_S)
    with suppress(RedisUnavailable):
        if not await living_workers(settings.redis_url, prefix=settings.prefix):
            err.print(f"No worker has shown itself; the job waits for one: `{command_name()} worker`.", markup=False)


def _why_not(event: Event) -> str | None:
    """Why a job has ended without an answer; None for every other event."""
    if event.failure is not None:
        return f"failed: {event.failure.message} ({event.failure.code})"
    return None if event.cancel_reason is None else f"was cancelled ({event.cancel_reason})"


@app.command()
def result(
    job_id: JobId,
    timeout: Annotated[float | None, typer.Option(help="Give up after this many seconds.")] = None,
    audio: Annotated[Path | None, typer.Option(help="Write the answer's speech to this file, as WAV.")] = None,
    as_json: AsJson = False,
) -> None:
    """Wait for a job's end and print the whole answer."""
    sys.exit(await_(_result(read_settings(), job_id, timeout, audio, as_json=as_json)))


async def _result(settings: Settings, job_id: str, timeout: float | None, audio: Path | None, *, as_json: bool) -> int:
    async with _waiting(settings, job_id, "result"), consumer_of(settings) as consumer:
        try:
            generation = await consumer.result(job_id, timeout=timeout)
        except JobEnded as error:
            if as_json:
                print_json(error.generation.to_json())
            else:
                err.print(str(error), markup=False)
            return EXIT_FAILED
    if as_json:
        print_json(generation.to_json())
    else:
        show_result(generation)
    return 0 if audio is None else _save_audio(generation, audio)


def _save_audio(generation: Generation, path: Path) -> int:
    if generation.audio is None:
        err.print("There is no speech in this answer: ask for it with modalities and audio in the body.")
        return EXIT_FAILED
    try:
        path.write_bytes(generation.audio)
    except OSError as error:
        err.print(f"{path} can not be written ({error.strerror})", markup=False)
        return EXIT_FAILED
    return 0


@app.command()
def cancel(
    job_id: JobId,
    reason: Annotated[str, typer.Option(help="Recorded with the job's end.")] = "requested",
    as_json: AsJson = False,
) -> None:
    """End a job, wherever it is."""
    outcome = await_(_cancel(read_settings(), job_id, reason))
    if as_json:
        print_json({"id": job_id, "outcome": outcome})
    else:
        words = {
            "cancelled": "was waiting; it has ended",
            "requested": "is being stopped",
            "ended": "had ended already",
        }
        print(f"job {job_id} {words[outcome]}")


async def _cancel(settings: Settings, job_id: str, reason: str) -> str:
    async with producer_of(settings) as producer:
        return await producer.cancel(job_id, reason=reason)


@app.command()
def usage(
    last: Annotated[int, typer.Option("--last", "-n", min=1, max=100_000, help="How many records.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Print the newest records of the usage ledger, one per model call."""
    records = await_(_usage(read_settings(), last))
    if as_json:
        for record in records:
            print_json(record.to_json())
    elif records:
        out.print(usage_table(records, width=out.width))
    else:
        err.print("The ledger is empty: no job has ended yet.")


async def _usage(settings: Settings, last: int) -> list[UsageRecord]:
    from deltafan._ledger import read_ledger

    return await read_ledger(settings.redis_url, prefix=settings.prefix, last=last)


@app.command()
def models(as_json: AsJson = False) -> None:
    """List the models of the catalogue, who serves them and whether the key is there."""
    from deltafan_cli._models import model_rows, models_table

    rows = model_rows(Catalogue.load(read_settings().models), os.environ)
    if as_json:
        for row in rows:
            print_json(row)
    else:
        out.print(models_table(rows, width=out.width))


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest("body", f"is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InvalidRequest("body", "is not a JSON object")
    return value
