"""Running worker processes."""

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.process import BaseProcess
from threading import Thread
from types import FrameType
from typing import NoReturn

from deltafan._workers import living_workers
from deltafan_cli._logging import set_up_logging
from deltafan_cli._view import err
from deltafan_config import Catalogue, Settings

log = logging.getLogger("deltafan.worker")

_SUPERVISE_S = 0.5
_RESTART_PAUSE_S = 1.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run_workers(settings: Settings, *, burst: bool) -> int:
    """Run as many worker processes as the settings say, until they are told to stop. Returns the exit code."""
    Catalogue.load(settings.models)  # what is wrong with it is said once, not by each process
    if settings.processes == 1:
        _run_one(settings, burst)
        return 0
    return _Supervisor(settings, burst=burst).run()


def check_worker(settings: Settings) -> int:
    """0 when a worker of this host is alive, else 1."""
    workers = asyncio.run(living_workers(settings.redis_url, prefix=settings.prefix))
    if any(worker.name.rpartition(":")[0] == socket.gethostname() for worker in workers):
        return 0
    err.print("no worker of this host has shown itself within the last seconds")
    return 1


def _run_one(settings: Settings, burst: bool) -> None:
    set_up_logging(settings)
    try:
        from deltafan_worker.main import run_worker
    except ModuleNotFoundError as error:
        _fail_without(error)
    run_worker(settings, os.environ, burst=burst)


def _run_child(settings: Settings, burst: bool) -> None:
    # A session of its own: Ctrl-C reaches the supervisor only, which passes it on, once.
    os.setsid()
    Thread(target=_stop_with_parent, name="deltafan-parent", daemon=True).start()
    _run_one(settings, burst)


def _stop_with_parent() -> None:
    """A supervisor that was killed passes nothing on."""
    supervisor = parent_process()
    assert supervisor is not None
    supervisor.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _fail_without(error: ModuleNotFoundError) -> NoReturn:
    sys.exit(f"The worker needs its extra ({error.name} is missing): pip install 'deltafan[worker]'")


class _Supervisor:
    """Starts worker processes, starts anew those that die, and stops all when told to."""

    def __init__(self, settings: Settings, *, burst: bool) -> None:
        self._settings = settings
        self._burst = burst
        self._context = get_context("spawn")
        self._stopping = False
        self._children: dict[int, BaseProcess] = {}

    def run(self) -> int:
        set_up_logging(self._settings)
        with _stop_signals(self._stop):
            for index in range(self._settings.processes):
                self._start(index)
            while alive := [child for child in self._children.values() if child.is_alive()]:
                alive[0].join(_SUPERVISE_S)
                self._replace_dead()
        return max((abs(child.exitcode or 0) for child in self._children.values()), default=0) and 1

    def _start(self, index: int) -> None:
        child = self._context.Process(target=_run_child, args=(self._settings, self._burst), name="deltafan-worker")
        # Inherited: what reaches a child before it listens waits until it does, and neither kills it nor is lost.
        # The tracker first: when multiprocessing starts it, it lifts the block again.
        resource_tracker.ensure_running()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            # A stop comes either before this, and nothing is started, or when the child is among those it is passed to.
            if not self._stopping:
                child.start()
                self._children[index] = child
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def _replace_dead(self) -> None:
        for index, child in tuple(self._children.items()):
            if child.exitcode not in (None, 0) and not self._stopping:
                log.error("worker process %s died (exit code %s); starting another", child.pid, child.exitcode)
                # One that dies as it starts would die again at once.
                time.sleep(_RESTART_PAUSE_S)
                self._start(index)

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        self._stopping = True
        for child in self._children.values():
            if child.is_alive() and child.pid is not None:
                os.kill(child.pid, number)


@contextmanager
def _stop_signals(handler: "signal._HANDLER") -> Iterator[None]:
    previous = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
