"""A worker process of the chaos runs: `python chaos/worker.py [--break NAME]`, with scripts of its own (scripts.py).

It takes orders on standard input, one a line: a signal's name and a stage (stages.py), `never mind`, or `clock` and by
how many seconds its wall clock is to be wrong from now on.
"""

import logging
import os
import sys
import threading
import time
from argparse import ArgumentParser

from deltafan_config import load_settings
from scripts import BREAKS, patch_scripts
from stages import Trap, watch


class WallClock:
    """What this process takes for the time; it jumps when it is told to. The monotonic clock never does."""

    def __init__(self) -> None:
        self._shift_s = 0
        self._time, self._time_ns = time.time, time.time_ns
        time.time = lambda: self._time() + self._shift_s
        time.time_ns = lambda: self._time_ns() + self._shift_s * 1_000_000_000

    def jump(self, shift_s: int) -> None:
        """Be wrong by so much, and say so."""
        self._shift_s = shift_s
        os.write(1, b"struck\n")


def obey(trap: Trap, clock: WallClock) -> None:
    """Take orders for as long as there is somebody to give them; a driver that is gone takes its workers along."""
    for line in sys.stdin:
        match line.split(maxsplit=1):
            case ["clock", seconds]:
                clock.jump(int(seconds))
            case ["never", _]:
                trap.take_away()
            case [name, stage]:
                trap.set(name, stage.strip())
    os._exit(1)


def main() -> None:
    """Run a worker until it is stopped."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--break", dest="broken", choices=BREAKS)
    patch_scripts(parser.parse_args().broken)
    logging.basicConfig(format="%(asctime)s %(process)d %(name)s: %(message)s", level=logging.INFO)
    trap, clock = Trap(), WallClock()
    watch(trap.reached)
    threading.Thread(target=obey, args=(trap, clock), daemon=True).start()
    from deltafan_worker.main import run_worker  # noqa: PLC0415  behind the patches

    run_worker(load_settings(os.environ), os.environ)


if __name__ == "__main__":
    main()
