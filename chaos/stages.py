"""The stages of a job in a worker process, and a trap at one of them."""

import os
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

from deltafan._lua import Script

STAGES = (
    "after claim",
    "before begin",
    "after begin",
    "after append",
    "before finish",
    "after finish",
    "before close",
    "after close",
)
"""Each script by its name, and the moment when the server has taken a delta."""


class Trap:
    """Signals this process when it reaches a stage.

    Every trap is answered by one line on standard output: `struck`, right before it strikes, or `missed`, when it is
    taken away again.
    """

    def __init__(self) -> None:
        self._set: tuple[int, str] | None = None
        self._lock = threading.Lock()

    def set(self, name: str, stage: str) -> None:
        """Wait for a stage; `name` is the signal's."""
        self._set = (getattr(signal, name), stage)

    def take_away(self) -> None:
        """Wait no longer."""
        with self._lock:
            if self._set is not None:
                self._set = None
                os.write(1, b"missed\n")

    def reached(self, stage: str) -> None:
        """This process is there."""
        with self._lock:
            if self._set is None or self._set[1] != stage:
                return
            (number, _), self._set = self._set, None
            os.write(1, b"struck\n")
        os.kill(os.getpid(), number)


def watch(reached: Callable[[str], None]) -> None:
    """Have `reached` called at each stage. What runs scripts is replaced: the worker itself knows nothing of it."""
    from deltafan_worker import _leased, _leaving  # noqa: PLC0415  behind whatever else is patched before the worker is imported
    from deltafan_worker._publisher import Publisher  # noqa: PLC0415
    from deltafan_worker._queue_pool import run_script  # noqa: PLC0415
    from deltafan_worker._writer import StreamWriter  # noqa: PLC0415

    Publisher.run = _watched(Publisher.run, reached)  # type: ignore[method-assign]
    for module in (_leased, _leaving):
        vars(module)["run_script"] = _watched(run_script, reached)
    on_append = StreamWriter.on_append

    def on_append_watched(self: StreamWriter, reply: Any) -> None:
        on_append(self, reply)
        reached("after append")

    StreamWriter.on_append = on_append_watched  # type: ignore[method-assign]


def _watched(runs: Callable[..., Any], reached: Callable[[str], None]) -> Callable[..., Any]:
    async def run(self: object, script: Script, keys: Sequence[str], args: Sequence[Any], **options: Any) -> Any:
        reached(f"before {script.name}")
        reply = await runs(self, script, keys, args, **options)
        if script.name != "claim" or reply[1]:  # else it has claimed nothing
            reached(f"after {script.name}")
        return reply

    return run
