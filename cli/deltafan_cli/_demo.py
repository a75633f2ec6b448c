"""The demonstration: one prompt, three consumers that join at different times, one bill."""

import asyncio
import hashlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from rich.columns import Columns
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel

from deltafan import Consumer, Event, Producer, UsageRecord, fold
from deltafan._ledger import read_ledger
from deltafan_cli._view import out, usage_card

MIDDLE_EVENTS = 25
LEDGER_WAIT_S = 10.0


@dataclass
class _Reader:
    """One consumer with a connection of its own, as another process would have."""

    name: str
    joins: str
    events: list[Event] = field(default_factory=list)
    replayed: int = 0

    @property
    def text(self) -> str:
        return fold(self.events).content

    @property
    def digest(self) -> str:
        whole = b"".join(f"{e.position} {e.type} ".encode() + e.data for e in self.events)
        return hashlib.sha256(whole).hexdigest()


async def demonstrate(redis_url: str, *, model: str, prompt: str) -> int:
    """Run the demonstration and print what happened. Returns 0 when all transcripts are the same."""
    readers = [
        _Reader("consumer 1", "from the start"),
        _Reader("consumer 2", "in the middle"),
        _Reader("consumer 3", "after the end"),
    ]
    async with Producer.connect(redis_url) as producer:
        body = {"max_tokens": 160, "temperature": 0.7}
        job = await producer.submit(model=model, messages=[{"role": "user", "content": prompt}], body=body)
    out.print(f"\nsubmitted    job {job.id}\nprompt       {escape(prompt)}\n")
    await _read_all(redis_url, job.id, readers)
    for reader in readers:
        joined = f"{reader.name} joined {reader.joins}"
        out.print(f"{joined:32} {len(reader.events)} events, {reader.replayed} replayed, sha256 {reader.digest[:12]}")
    out.print()
    records = await _bill(redis_url, job.id)
    for record in records:
        out.print(usage_card(record))
    out.print()
    same = len({reader.digest for reader in readers}) == 1 and readers[0].events[-1].type == "completed"
    out.print(
        "The three transcripts are identical." if same else "The transcripts differ, or the job failed.", style="bold"
    )
    return 0 if same and records else 1


async def _read_all(redis_url: str, job_id: str, readers: list[_Reader]) -> None:
    middle, end = asyncio.Event(), asyncio.Event()
    now = asyncio.Event()
    now.set()

    async def read(reader: _Reader, join: asyncio.Event) -> None:
        await join.wait()
        async with Consumer.connect(redis_url) as consumer:
            reader.replayed = len(readers[0].events)
            async with consumer.tail(job_id) as events:
                async for event in events:
                    reader.events.append(event)
                    if reader is readers[0]:
                        _announce(reader, middle, end)

    with _view(readers):
        async with asyncio.TaskGroup() as tasks:
            for reader, join in zip(readers, (now, middle, end), strict=True):
                tasks.create_task(read(reader, join))
    if not out.is_terminal:
        out.print(escape(readers[0].text) + "\n")


def _announce(first: _Reader, middle: asyncio.Event, end: asyncio.Event) -> None:
    if len(first.events) >= MIDDLE_EVENTS:
        middle.set()
    if first.events[-1].is_terminal:
        middle.set()
        end.set()


def _view(readers: list[_Reader]) -> AbstractContextManager[object]:
    """Three panels side by side on a terminal; nothing elsewhere."""
    if not out.is_terminal:
        return nullcontext()

    def render() -> Columns:
        width = max(24, (out.width - 4) // 3)
        height = max(8, out.height - 16)
        # The newest lines: a panel shows the beginning of what does not fit.
        lines = (height - 2) * (width - 4)
        panels = [
            Panel(escape(r.text[-lines:]), title=r.name, subtitle=r.joins, width=width, height=height) for r in readers
        ]
        return Columns(panels)

    return Live(get_renderable=render, console=out, refresh_per_second=12)


async def _bill(redis_url: str, job_id: str) -> list[UsageRecord]:
    """The job's records, which the worker writes right after the end."""
    async with asyncio.timeout(LEDGER_WAIT_S):
        while not (records := [r for r in await read_ledger(redis_url, last=100) if r.job_id == job_id]):  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(0.05)
    return records
