"""A worker process that sends itself a signal at a point: `python -m support.signalled_worker SIGKILL after:finish`.

A point is `before:` or `after:` a script's call, by the script's name, with `replay` for a `begin` in that mode; the
same of `leftover`, where what an earlier claim has left is read, and of `tell`, where a provider is told to end a
response; or `after:append`, when the server has taken the first delta. Nothing of this is in the worker: what runs
scripts is replaced here.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from deltafan._lua import load
from deltafan._resp import Handler, RespConnection
from deltafan_config import load_settings
from deltafan_worker import _calls, _leased, _leaving, _limits, _run
from deltafan_worker._publisher import Publisher
from deltafan_worker._queue_pool import run_script
from deltafan_worker._resumption import read_leftover
from deltafan_worker._upstream import tell
from deltafan_worker._writer import StreamWriter
from deltafan_worker.main import run_worker


class _Point:
    """Where the process sends itself a signal. Once: it may live on, and come by again."""

    def __init__(self, name: str, number: signal.Signals) -> None:
        self._name = name
        self._number = number
        self._is_over = False

    def reach(self, name: str) -> None:
        if name == self._name and not self._is_over:
            self._is_over = True
            os.kill(os.getpid(), self._number)

    def around(self, runs: Callable[..., Any], name_of: Callable[..., str]) -> Callable[..., Any]:
        async def run(*args: Any, **options: Any) -> Any:
            name = name_of(*args)
            self.reach(f"before:{name}")
            reply = await runs(*args, **options)
            took_nothing = name == "claim" and not reply[1]
            if not took_nothing:
                self.reach(f"after:{name}")
            return reply

        return run

    def around_noting(self, send: Callable[..., None]) -> Callable[..., None]:
        source = load("note", "deltafan_worker").source

        def noting(publisher: Publisher, command: bytes, handler: Handler) -> None:
            if source not in command:
                send(publisher, command, handler)
                return
            self.reach("before:note_response")
            send(publisher, command, lambda _reply: self.reach("after:note_response"))

        return noting


def _script_name(_connection: object, script: Any, _keys: object, args: Any) -> str:
    return "replay" if script.name == "begin" and args[4] == "replay" else str(script.name)


def _main(number: signal.Signals, name: str) -> None:
    point = _Point(name, number)
    RespConnection.run = point.around(RespConnection.run, _script_name)  # type: ignore[method-assign]
    for module in (_leased, _leaving, _limits):
        vars(module)["run_script"] = point.around(run_script, _script_name)
    vars(_run)["read_leftover"] = point.around(read_leftover, lambda *_: "leftover")
    vars(_calls)["tell"] = point.around(tell, lambda *_: "tell")
    Publisher.send = point.around_noting(Publisher.send)  # type: ignore[method-assign]
    on_append = StreamWriter.on_append

    def taken(writer: StreamWriter, reply: Any) -> None:
        point.reach("after:append")
        on_append(writer, reply)

    StreamWriter.on_append = taken  # type: ignore[method-assign, assignment]
    run_worker(load_settings(os.environ), os.environ)


if __name__ == "__main__":
    _main(signal.Signals[sys.argv[1]], sys.argv[2])
