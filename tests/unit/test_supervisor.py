"""The supervisor of worker processes: a stop reaches every child, whenever it comes."""

import os
import signal
import subprocess
from typing import Any

import pytest

from deltafan_cli._worker import _Supervisor
from deltafan_config import Settings


class Child:
    """A process of the system that behaves as multiprocessing's; its start is when the stop arrives."""

    started: int

    def __init__(self, **_: Any) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        type(self).started += 1
        self._process = subprocess.Popen(["sleep", "30"], preexec_fn=_listen)  # noqa: PLW1509  no threads here
        os.kill(os.getpid(), signal.SIGTERM)

    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def join(self, timeout: float) -> None:
        assert self._process is not None
        self._process.wait(timeout + 5)

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def exitcode(self) -> int | None:
        return None if self._process is None else self._process.poll()


def _listen() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))


class Context:
    Process = Child


def test_a_stop_that_arrives_with_a_childs_start_reaches_that_child(monkeypatch: pytest.MonkeyPatch) -> None:
    Child.started = 0
    supervisor = _Supervisor(Settings(processes=2), burst=False)
    monkeypatch.setattr(supervisor, "_context", Context)
    assert supervisor.run() == 1, "sleep dies of the signal, which tells that it got one"
    assert Child.started == 1, "the second is not started any more"
