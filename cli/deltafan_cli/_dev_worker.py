"""The worker of `deltafan dev`: `python -m deltafan_cli._dev_worker` is one that ends with whoever started it."""

import os
import signal
import sys
import time
from threading import Thread

from deltafan_cli._commands import read_settings
from deltafan_cli._embedded import wait_for_parent
from deltafan_cli._worker import run_workers

_HAND_OVER_S = 3.0


def _stop_with_parent() -> None:
    wait_for_parent()
    os.kill(os.getpid(), signal.SIGTERM)
    # Where the parent was killed the server has ended as well, and nobody takes what is handed over.
    time.sleep(_HAND_OVER_S)
    os._exit(1)


if __name__ == "__main__":
    Thread(target=_stop_with_parent, daemon=True).start()
    sys.exit(run_workers(read_settings(), burst=False))
