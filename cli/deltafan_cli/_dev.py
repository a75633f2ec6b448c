"""`deltafan dev`: everything on one machine, and the demonstration on top of it."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from deltafan_cli._embedded import DEFAULT_PORT, NotInstalled, embedded_valkey
from deltafan_cli._local_model import MODEL, local_model
from deltafan_cli._view import err, out
from deltafan_config import Catalogue, CatalogueError, MissingKey, UnknownModel, shipped

_STOP_S = 15.0


@dataclass(frozen=True, slots=True)
class Stack:
    """What runs."""

    redis_url: str
    model_url: str | None


def run_dev(*, demo: bool, once: bool, prompt: str, model: str) -> int:
    """Start everything, demonstrate it if asked to, and serve until Ctrl-C. Returns the exit code."""
    try:
        with _stack(model) as stack:
            code = 0
            if demo:
                from deltafan_cli._demo import demonstrate

                code = asyncio.run(demonstrate(stack.redis_url, model=model, prompt=prompt))
            if not once:
                _serve(stack, model)
            return code
    except (NotInstalled, MissingKey, UnknownModel) as error:
        err.print(str(error), style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        return 0


def _serve(stack: Stack, model: str) -> None:
    if f":{DEFAULT_PORT}/" not in stack.redis_url:
        out.print(f"Port {DEFAULT_PORT} is taken, so other terminals need: export DELTAFAN_REDIS_URL={stack.redis_url}")
    out.print(f"Try in another terminal:  deltafan submit -m {model} -f 'Hello!'")
    out.print("Ctrl-C stops everything.")
    signal.pause()


_NOT_OURS = ("DELTAFAN_STREAMS_URL", "DELTAFAN_PREFIX")


@contextmanager
def _stack(model: str) -> Iterator[Stack]:
    with ExitStack() as stack, _signal_as_interrupt():
        redis_url = stack.enter_context(embedded_valkey())
        out.print(f"Valkey       {redis_url}")
        model_url = stack.enter_context(local_model()) if model == MODEL else None
        if model_url is not None:
            out.print(f"local model  {model_url}  (SmolLM2 135M, on this machine's processor)")
        catalogue = stack.enter_context(_catalogue(model_url))
        # What names other servers or keys in this shell is not meant for these.
        inherited = {name: value for name, value in os.environ.items() if name not in _NOT_OURS}
        env = {**inherited, "DELTAFAN_REDIS_URL": redis_url, "DELTAFAN_MODELS": str(catalogue)}
        for route in Catalogue.load(catalogue).resolve(model):
            route.provider.api_key(env)
        stack.enter_context(_worker(env))
        out.print("worker       running")
        yield Stack(redis_url, model_url)


@contextmanager
def _catalogue(model_url: str | None) -> Iterator[Path]:
    """The catalogue in force, with the local model where it listens this time."""
    source = Path(os.environ.get("DELTAFAN_MODELS") or shipped())
    if model_url is None:
        yield source
        return
    local = Catalogue.load(source).providers.get("local")
    if local is None:
        raise CatalogueError(f"{source}: has no provider named local, which the local model's server would stand for")
    default = local.base_url
    with tempfile.TemporaryDirectory(prefix="deltafan-") as folder:
        path = Path(folder) / "models.toml"
        path.write_text(source.read_text(encoding="utf-8").replace(default, model_url), encoding="utf-8")
        yield path


@contextmanager
def _worker(env: Mapping[str, str]) -> Iterator[None]:
    # A session of its own: Ctrl-C is for us, who stop the worker before the server it needs.
    command = [sys.executable, "-m", "deltafan_cli", "worker"]
    process = subprocess.Popen(command, env={"DELTAFAN_LOG_LEVEL": "warning", **env}, start_new_session=True)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)  # the second says: hand over at once
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def _signal_as_interrupt() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that whatever stops us, we stop what we started."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
