"""Batches: rows per second, CPU and memory of 10,000 and of 100,000 rows; a semaphore and the SDK beside them."""

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from redis.asyncio import Redis

from deltafan._background import background
from measure import HERE, Bench, Report, cpu_s, worker

SMALL, LARGE = 10_000, 100_000
MODEL = "bench-10-20-1"
"""Ten deltas, 20 ms apart."""
WORKERS, SLOTS = 2, 500
AT_ONCE = 100
"""Of the loop's calls: it is at its best, as more of them make its client slower."""


@dataclass
class Cost:
    """What a run took."""

    rows: int
    seconds: float = 0.0
    runner_s: float = 0.0
    workers_s: float = 0.0
    peak_bytes: int = 0
    redis_bytes: int = 0

    def words(self) -> str:
        """It in a line."""
        cpu_us = (self.runner_s + self.workers_s) / self.rows * 1e6
        return (
            f"{self.rows:,} rows, {self.rows / self.seconds:,.0f} rows/s, {cpu_us:,.0f} µs of CPU per row "
            f"(runner {self.runner_s / self.rows * 1e6:,.0f}), runner at most {self.peak_bytes / 2**20:.1f} MiB"
        )


async def run(bench: Bench, report: Report) -> None:
    """The same rows through the fleet and through the loop."""
    small = await _ours(bench, SMALL)
    report.note(f"deltafan: {small.words()}, Redis at most {small.redis_bytes / 2**20:.0f} MiB")
    large = await _ours(bench, LARGE)
    report.note(f"deltafan: {large.words()}, Redis at most {large.redis_bytes / 2**20:.0f} MiB")
    growth = large.peak_bytes / small.peak_bytes
    figure = f"{growth:.2f} times the runner's memory for {LARGE // SMALL} times the rows"
    report.add("batch memory", figure, "flat", growth < 1.1)
    for rows, kind, ours in ((SMALL, "stream", small), (LARGE, "whole", large)):
        naive = await _naive(bench, rows, kind)
        report.note(f"a semaphore and the openai client, {kind} answers: {naive.words()}")
        report.note(
            f"deltafan, which streams, answers {naive.seconds / ours.seconds:.1f} times as many rows per second"
        )


async def _ours(bench: Bench, rows: int) -> Cost:
    source, output = _input(bench, rows), bench.folder / f"out-{rows}.jsonl"
    output.unlink(missing_ok=True)
    command = ["-m", "deltafan_cli", "batch", "run", "-m", f"b/{MODEL}", "-i", str(source), "-o", str(output), "--json"]
    cost = Cost(rows)
    async with Redis.from_url(bench.redis_url) as redis:
        await redis.flushall()
        with ExitStack() as stack:
            pids = [stack.enter_context(worker(bench, concurrency=SLOTS)).pid for _ in range(WORKERS)]
            await asyncio.sleep(2)
            before = sum(map(cpu_s, pids))
            async with _watched(redis, cost):
                await asyncio.to_thread(_finish, command, bench.env, cost)
            cost.workers_s = sum(map(cpu_s, pids)) - before
    _check(output, rows)
    return cost


async def _naive(bench: Bench, rows: int, kind: str) -> Cost:
    source, output = _input(bench, rows), bench.folder / "naive.jsonl"
    command = [str(HERE / "naive_batch.py"), str(source), str(output), bench.upstream_url, MODEL, str(AT_ONCE), kind]
    cost = Cost(rows)
    await asyncio.to_thread(_finish, command, {}, cost)
    _check(output, rows)
    return cost


def _finish(command: list[str], env: dict[str, str], cost: Cost) -> None:
    """Run a process to its end and see what it used."""
    started = time.monotonic()
    with Path(os.devnull).open("wb") as nowhere:
        actions = [(os.POSIX_SPAWN_DUP2, nowhere.fileno(), stream) for stream in (1, 2)]
        python = sys.executable
        pid = os.posix_spawn(python, [python, *command], {**os.environ, **env}, file_actions=actions)
    _, status, used = os.wait4(pid, 0)
    if status != 0:
        raise RuntimeError(f"{' '.join(command)} ended with status {status}")
    cost.seconds, cost.runner_s = time.monotonic() - started, used.ru_utime + used.ru_stime
    cost.peak_bytes = used.ru_maxrss * 1024


@asynccontextmanager
async def _watched(redis: Redis, cost: Cost) -> AsyncIterator[None]:
    async def watch() -> None:
        while True:
            used = await redis.info("memory")
            cost.redis_bytes = max(cost.redis_bytes, used["used_memory"])
            await asyncio.sleep(0.5)

    async with background(watch(), "watch"):
        yield


def _input(bench: Bench, rows: int) -> Path:
    path = bench.folder / f"in-{rows}.jsonl"
    if not path.exists():
        with path.open("w") as file:
            for row in range(rows):
                file.write(json.dumps({"id": f"row-{row}", "prompt": f"Say something about the number {row}."}) + "\n")
    return path


def _check(output: Path, rows: int) -> None:
    """Every row has one answer."""
    seen = {json.loads(line)["custom_id"] for line in output.open()}
    if len(seen) != rows:
        raise RuntimeError(f"{len(seen)} of {rows} rows were answered")
