"""A worker process that kills itself at a point: `python -m support.dying_worker after:finish`.

A point is `before:` or `after:` a script's call, by the script's name, with `replay` for a `begin` in that mode; or
`after:append`, when the server has taken the first delta. Nothing of this is in the worker: what runs scripts is
replaced here.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from deltafan._lua import Script
from deltafan_config import load_settings
from deltafan_worker import _leased, _limits
from deltafan_worker._publisher import Publisher
from deltafan_worker._queue_pool import run_script
from deltafan_worker._writer import StreamWriter
from deltafan_worker.main import run_worker


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _mortal(runs: Callable[..., Any], point: str) -> Callable[..., Any]:
    """What runs scripts, dying before or after one of them."""
    when, _, wanted = point.partition(":")

    async def run(self: object, script: Script, keys: Sequence[str], args: Sequence[Any]) -> Any:
        name = "replay" if script.name == "begin" and args[4] == "replay" else script.name
        if (when, wanted) == ("before", name):
            _die()
        reply = await runs(self, script, keys, args)
        took_nothing = name == "claim" and not reply[1]
        if (when, wanted) == ("after", name) and not took_nothing:
            _die()
        return reply

    return run


def _main(point: str) -> None:
    Publisher.run = _mortal(Publisher.run, point)  # type: ignore[method-assign]
    for module in (_leased, _limits):
        vars(module)["run_script"] = _mortal(run_script, point)
    if point == "after:append":
        StreamWriter.on_append = lambda self, reply: _die()  # type: ignore[method-assign]  # noqa: ARG005
    run_worker(load_settings(os.environ), os.environ)


if __name__ == "__main__":
    _main(sys.argv[1])
