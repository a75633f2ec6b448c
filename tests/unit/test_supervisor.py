"""The supervisor of worker processes: a stop reaches every child, whenever it comes."""

import signal
import subprocess
import sys
import threading
from typing import Any

import pytest

from deltafan_cli._worker import _Supervisor
from deltafan_config import Settings

LISTEN = """
import signal, time
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
time.sleep(30)
"""


class Child:
    """A process of the system that behaves as multiprocessing's; its start is when the stop arrives."""

    started: int

    def __init__(self, **_: Any) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        type(self).started += 1
        self._process = subprocess.Popen([sys.executable, "-c", LISTEN])
        # To this thread: another one, of those that run tests, has not blocked the signal.
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

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


class Context:
    Process = Child


def test_a_stop_that_arrives_with_a_childs_start_reaches_that_child(monkeypatch: pytest.MonkeyPatch) -> None:
    Child.started = 0
    supervisor = _Supervisor(Settings(processes=2), burst=False)
    monkeypatch.setattr(supervisor, "_context", Context)
    assert supervisor.run() == 1, "it dies of the signal, which tells that it got one"
    assert Child.started == 1, "the second is not started any more"
