"""Workers for tests: in the test's own event loop, or as processes that can be killed."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

from deltafan._background import background
from deltafan_config import load_settings
from deltafan_worker._leased import LeasedWorker
from deltafan_worker.main import open_worker

CATALOGUE = """
[providers.sim]
base_url = "{url}"
api = ["chat", "responses"]
[providers.other]
base_url = "{url}"
[providers.compatible]
base_url = "{root}/compatible-mode/v1"
api = ["chat", "responses"]
[providers.native]
base_url = "{root}/api/v1"
api = "dashscope"
[providers.partial]
base_url = "{url}"
continuation = "partial"
[providers.prefix]
base_url = "{url}"
continuation = "prefix"
[providers.vllm]
base_url = "{url}"
continuation = "continue_final_message"
[providers.background]
base_url = "{url}"
api = "responses"
continuation = "background"
[providers.secret]
base_url = "{url}"
api = "responses"
continuation = "background"
api_key_env = "SIM_KEY"
[providers.keyed]
base_url = "{url}"
api_key_env = "SIM_KEY"
[providers.narrow]
base_url = "{url}"
limits = {{ requests_per_minute = 3 }}
[models.roomy]
provider = ["narrow", "other"]
[models.second]
provider = ["other", "narrow"]
[models.tokens]
provider = "other"
limits = {{ tokens_per_minute = 1000 }}
[models.one]
provider = "other"
limits = {{ concurrency = 1 }}
[models.double]
provider = ["sim", "other"]
[models.sim]
provider = ["sim", "native"]
price = {{ currency = "USD", input = 1.0, cached_input = 0.5, output = 2.0 }}
"""


def settings_env(redis_url: str, upstream_url: str, folder: Path, **settings: object) -> dict[str, str]:
    """An environment for a worker of these servers."""
    catalogue = folder / "models.toml"
    catalogue.write_text(CATALOGUE.format(url=upstream_url, root=upstream_url.removesuffix("/v1")))
    env = {"DELTAFAN_REDIS_URL": redis_url, "DELTAFAN_MODELS": str(catalogue), "DELTAFAN_LEASE_S": "3"}
    return env | {f"DELTAFAN_{name.upper()}": str(value) for name, value in settings.items()}


@asynccontextmanager
async def running_worker(env: dict[str, str], *, burst: bool = False) -> AsyncIterator[LeasedWorker]:
    """A worker in this event loop; drained and, where jobs still run, made to hand them over at the end."""
    async with open_worker(load_settings(env), env, burst=burst) as worker, background(worker.main(), "worker") as main:
        yield worker
        worker.drain()
        worker.drain()
        await asyncio.wait_for(main, 20)


def prepended(folder: Path) -> str:
    """PYTHONPATH with a folder before whatever it holds: the code under test may not be the installed one."""
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


@contextmanager
def worker_process(
    env: dict[str, str], *, at: str = "", gets: signal.Signals = signal.SIGKILL
) -> Iterator["subprocess.Popen[bytes]"]:
    """A worker process, killed at the end if it is still there; `at` is a point of support.signalled_worker."""
    signalled = ["support.signalled_worker", gets.name, at]
    command = [sys.executable, "-m", *(signalled if at else ["deltafan_cli", "worker"])]
    whole = {**os.environ, **env, "PYTHONPATH": prepended(Path(__file__).parents[1])}
    process = subprocess.Popen(command, env=whole, start_new_session=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()


@contextmanager
def supervisor_process(env: dict[str, str], *, processes: int) -> Iterator["subprocess.Popen[str]"]:
    """`deltafan worker` with several processes; all of them are killed at the end if they are still there."""
    command = [sys.executable, "-m", "deltafan_cli", "worker", "--processes", str(processes)]
    process = subprocess.Popen(command, env={**os.environ, **env}, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        children = child_pids(process) if process.poll() is None else []
        process.kill()
        kill_all(children)
        process.communicate()


def kill_all(pids: Iterable[int]) -> None:
    """Kill processes, as far as they are still there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def child_pids(process: "subprocess.Popen[str] | int") -> list[int]:
    """The processes that a process has started."""
    pid = process if isinstance(process, int) else process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
