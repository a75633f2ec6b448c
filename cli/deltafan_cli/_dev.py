"""`deltafan dev`: everything on one machine, and the demonstration on top of it."""

import asyncio
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltafan._workers import living_workers
from deltafan_cli._commands import command_name
from deltafan_cli._embedded import DEFAULT_PORT, NotInstalled, child, embedded_valkey
from deltafan_cli._local_model import MODEL, local_model
from deltafan_cli._view import err, out
from deltafan_config import Catalogue, CatalogueError, MissingKey, UnknownModel, load_settings, shipped

_LOOK_S = 0.2


class WorkerEnded(Exception):
    """The worker has ended although nobody told it to; the message says how."""


@dataclass(frozen=True, slots=True)
class Stack:
    """What runs."""

    redis_url: str
    worker: "subprocess.Popen[str]"
    unusual: Mapping[str, str]
    """Variables without which other terminals would look elsewhere."""

    def check(self) -> None:
        """Raise WorkerEnded unless the worker runs."""
        if self.worker.poll() is not None:
            raise WorkerEnded(f"the worker has ended (exit code {self.worker.returncode}); its last words are above")


def run_dev(*, demo: bool, once: bool, prompt: str, model: str) -> int:
    """Start everything, demonstrate it if asked to, and serve until Ctrl-C. Returns the exit code."""
    try:
        with _stack(model) as stack:
            code = 0
            if demo:
                from deltafan_cli._demo import demonstrate

                code = asyncio.run(_watched(stack, demonstrate(stack.redis_url, model=model, prompt=prompt)))
            if not once:
                _serve(stack, model)
            return code
    except (NotInstalled, WorkerEnded, MissingKey, UnknownModel) as error:
        err.print(str(error), style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        return 0


def _serve(stack: Stack, model: str) -> None:
    for name, value in stack.unusual.items():
        out.print(f"The usual port is taken, so other terminals need:\n  export {name}={value}")
    out.print(f"Try in another terminal:\n  {command_name()} submit -m {model} -f 'Hello!'", markup=False)
    out.print("Ctrl-C stops everything.")
    while True:
        stack.check()
        time.sleep(_LOOK_S)


async def _watched(stack: Stack, work: Coroutine[Any, Any, int]) -> int:
    """The work's outcome, unless the worker ends before it."""
    task = asyncio.create_task(work)
    while not (await asyncio.wait((task,), timeout=_LOOK_S))[0]:
        stack.check()
    return task.result()


_OURS = ("DELTAFAN_REDIS_URL", "DELTAFAN_STREAMS_URL", "DELTAFAN_PREFIX")


@contextmanager
def _stack(model: str) -> Iterator[Stack]:
    _interrupt_on_stop_signals()
    with ExitStack() as stack:
        try:
            yield _start(model, stack)
        finally:
            _ignore_stop_signals()  # a second Ctrl-C would only leave behind what is still to be stopped


def _start(model: str, stack: ExitStack) -> Stack:
    # What names other servers or keys in this shell is not meant for these.
    env = {name: value for name, value in os.environ.items() if name not in _OURS}
    # What is wrong with them is said before anything is started.
    source = load_settings(env).models or shipped()
    local_url = _check_catalogue(source, model, env)
    unusual = {}
    redis_url = stack.enter_context(embedded_valkey())
    out.print(f"Valkey       {redis_url}")
    if f":{DEFAULT_PORT}/" not in redis_url:
        unusual["DELTAFAN_REDIS_URL"] = redis_url
    if model == MODEL:
        model_url = stack.enter_context(local_model())
        out.print(f"local model  {model_url}  (SmolLM2 135M, on this processor)")
        if model_url != local_url:
            source = stack.enter_context(_replaced(source, local_url, model_url))
            unusual["DELTAFAN_MODELS"] = str(source)
    running = Stack(redis_url, stack.enter_context(_worker(env, redis_url, source)), unusual)
    while not asyncio.run(living_workers(redis_url)):
        running.check()
        time.sleep(_LOOK_S / 4)
    out.print("worker       running")
    return running


def _check_catalogue(source: Path, model: str, env: Mapping[str, str]) -> str:
    """Whether the model can be asked with what there is. Gives the URL where the local model is expected."""
    catalogue = Catalogue.load(source)
    for route in catalogue.resolve(model):
        route.provider.api_key(env)
    local = catalogue.providers.get("local")
    if local is None and model == MODEL:
        raise CatalogueError(f"{source}: has no provider named local, which the local model's server would stand for")
    return "" if local is None else local.base_url


@contextmanager
def _replaced(source: Path, expected_url: str, model_url: str) -> Iterator[Path]:
    """The catalogue with the local model where it listens this time."""
    with tempfile.TemporaryDirectory(prefix="deltafan-") as folder:
        path = Path(folder) / "models.toml"
        path.write_text(source.read_text(encoding="utf-8").replace(expected_url, model_url), encoding="utf-8")
        yield path


def _worker(env: Mapping[str, str], redis_url: str, catalogue: Path) -> AbstractContextManager["subprocess.Popen[str]"]:
    ours = {
        "DELTAFAN_REDIS_URL": redis_url,
        "DELTAFAN_MODELS": str(catalogue),
        # Its jobs end with it, because their server does: nothing is worth waiting for.
        "DELTAFAN_DRAIN_TIMEOUT_S": "0",
    }
    return child("deltafan_cli._dev_worker", {"DELTAFAN_LOG_LEVEL": "warning", **env, **ours})


def _interrupt_on_stop_signals() -> None:
    """SIGTERM and the terminal's end are as Ctrl-C: whatever stops us, we stop what we started."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants it
            signal.signal(number, interrupt)


def _ignore_stop_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
