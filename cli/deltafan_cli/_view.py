"""How events and results are shown: with colours on a terminal, as plain lines or JSON elsewhere."""

import sys
from collections.abc import Mapping
from typing import Any

import orjson
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deltafan import Event, Generation, UsageRecord

_PIPE_COLUMNS = 250
"""Tables in a pipe or a file are not cut to the 80 columns of a terminal that is not there."""

_WIDE = 110
"""Columns from which on a row of the ledger has room for a whole id and for rare counts."""
_SHORT_ID = 8
_RARE = ("cached", "reasoning")
"""Counts that are left out when no row has them."""
NOTHING = "–"
"""Stands in a table where there is no value."""

out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else _PIPE_COLUMNS)
err = Console(stderr=True, highlight=False, soft_wrap=True)

_VOIDING = ("fresh", "restart", "replay")
"""Modes of an attempt that void what came before."""
_STYLES = {"reasoning": "dim italic", "content": "", "refusal": "yellow", "tool_call": "cyan"}


def print_json(data: Mapping[str, Any]) -> None:
    """One JSON object on a line of its own."""
    sys.stdout.write(orjson.dumps(data).decode() + "\n")
    sys.stdout.flush()


def event_json(event: Event) -> dict[str, Any]:
    """An event as `--json` prints it."""
    data: dict[str, Any] = {"position": str(event.position), "type": event.type}
    return data | ({"text": event.text} if event.text else {"data": event.payload})


class EventPrinter:
    """Prints a job's events as they come."""

    def __init__(self, *, as_json: bool, text_only: bool = False) -> None:
        self._as_json = as_json
        self._text_only = text_only and not out.is_terminal
        self._last_type = ""

    def show(self, event: Event) -> None:
        """Print one event."""
        if self._as_json:
            print_json(event_json(event))
        elif self._text_only:
            self._show_text(event)
        elif out.is_terminal:
            self._show_live(event)
        else:
            text = orjson.dumps(event.text).decode() if event.text else event.data.decode()
            sys.stdout.write(f"{event.position}\t{event.type}\t{text}\n")
            sys.stdout.flush()

    def _show_text(self, event: Event) -> None:
        if event.type in ("content", "refusal"):
            sys.stdout.write(event.text)
            sys.stdout.flush()
        elif event.tool_call is not None and event.tool_call.name:
            err.print(f"The model calls {event.tool_call.name}; `deltafan result` shows with what.", markup=False)
        elif event.started is not None and event.started.mode in _VOIDING and self._last_type:
            err.print("\nThe answer starts over: what was printed so far is void.")
        elif event.is_terminal:
            sys.stdout.write("\n")
        self._last_type = event.type

    def _show_live(self, event: Event) -> None:
        if event.type == "started" and event.started is not None:
            started = event.started
            fate = "the text above is void" if started.mode in _VOIDING else "the text above stands"
            again = f" (attempt {started.attempt_no}, {started.mode}: {fate})" if self._last_type else ""
            out.print(f"{started.model} on {started.provider}{again}", style="bold magenta")
        elif event.type == "tool_call" and event.tool_call is not None:
            name = f"\n{event.tool_call.name}: " if event.tool_call.name else ""
            out.print(escape(name + event.tool_call.arguments), style=_STYLES["tool_call"], end="")
        elif event.annotation is not None:
            source = event.annotation.get("url") or event.annotation.get("title") or event.annotation.get("type")
            out.print(escape(f"\n[{source}]"), style="dim", end="")
        elif event.audio is not None:
            out.print(escape(event.audio.transcript) or "♪", style="blue", end="")
        elif event.is_delta:
            gap = "\n\n" if self._last_type not in ("", "started", event.type) else ""
            out.print(escape(gap + event.text), style=_STYLES[event.type], end="")
        elif event.is_terminal:
            out.print()
            show_ending(event)
        self._last_type = event.type


def show_ending(event: Event) -> None:
    """The last line of a live view."""
    if event.failure is not None:
        err.print(f"failed: {escape(event.failure.message)} ({event.failure.code})", style="bold red")
    elif event.type == "cancelled":
        err.print(f"cancelled ({escape(event.cancel_reason or '')})", style="bold yellow")
    if event.usage is not None:
        out.print(usage_line(event.usage), style="dim")


def usage_line(usage: UsageRecord) -> str:
    """The bill in one line."""
    parts = [f"{_number(usage.input_tokens)} tokens in, {_number(usage.output_tokens)} out"]
    if usage.source == "estimated":
        parts.append("estimated")
    if usage.cost is not None:
        parts.append(f"{usage.cost:.6f} {usage.currency}")
    if usage.first_delta_ms is not None:
        parts.append(f"first delta after {usage.first_delta_ms} ms")
    if usage.duration_ms is not None:
        parts.append(f"{usage.duration_ms / 1000:.2f} s")
    return ", ".join(parts)


def show_result(result: Generation) -> None:
    """A whole answer: on a terminal with its parts, elsewhere only its text."""
    if not out.is_terminal:
        sys.stdout.write((result.content or result.refusal) + "\n")
        for call in result.tool_calls:
            sys.stdout.write(f"{call.name}({call.arguments})\n")
        return
    if result.reasoning:
        out.print(escape(result.reasoning), style=_STYLES["reasoning"])
        out.print()
    for text, style in ((result.content, ""), (result.refusal, _STYLES["refusal"])):
        if text:
            out.print(escape(text), style=style)
    for call in result.tool_calls:
        out.print(escape(f"{call.name}({call.arguments})"), style=_STYLES["tool_call"])
    for annotation in result.annotations:
        out.print(
            escape(f"[{annotation.get('url') or annotation.get('title') or annotation.get('type')}]"), style="dim"
        )
    if result.pcm:
        out.print(f"{len(result.pcm) / 48_000:.1f} s of speech; --audio FILE saves it", style="blue")
    if result.usage is not None:
        out.print(usage_line(result.usage), style="dim")


def usage_table(records: list[UsageRecord], *, width: int) -> Table:
    """Records of the ledger, one a row; on a narrow terminal jobs are shown by the beginning of their ids."""
    is_wide = width >= _WIDE
    rows = [_usage_row(record, is_wide=is_wide) for record in records]
    table = Table(box=None, header_style="bold", pad_edge=False)
    shown = [name for name in rows[0] if name not in _RARE or (is_wide and any(row[name] != NOTHING for row in rows))]
    for name in shown:
        is_word = name in ("job", "model", "outcome")
        table.add_column(name, justify="left" if is_word else "right", no_wrap=name not in ("model", "outcome"))
    for row in rows:
        table.add_row(*(row[name] for name in shown))
    return table


def _usage_row(record: UsageRecord, *, is_wide: bool) -> dict[str, str]:
    job = record.job_id
    return {
        "job": job if is_wide or len(job) <= _SHORT_ID else f"{job[:_SHORT_ID]}…",
        "model": record.model,
        "outcome": record.outcome if record.source == "provider" else f"{record.outcome} ({record.source})",
        "input": _number(record.input_tokens),
        "cached": _number(record.cached_input_tokens),
        "output": _number(record.output_tokens),
        "reasoning": _number(record.reasoning_tokens),
        "cost": NOTHING if record.cost is None else f"{record.cost:.6f} {record.currency}",
        "seconds": NOTHING if record.duration_ms is None else f"{record.duration_ms / 1000:.2f}",
    }


def usage_card(record: UsageRecord) -> Table:
    """One record with all that it says, a line each."""
    table = Table(box=None, show_header=False, pad_edge=False, title="usage record", title_justify="left")
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in record.to_json().items():
        if name != "raw":
            table.add_row(
                name, escape(f"{value:.10f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value))
            )
    return table


def _number(count: int | None) -> str:
    return NOTHING if count is None else str(count)
