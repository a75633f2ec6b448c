"""Waiting for what gives no sign, a process's end among it: the one place where tests sleep."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from inspect import isawaitable
from pathlib import Path


async def wait_until(
    predicate: Callable[[], object | Awaitable[object]], description: str, *, timeout_s: float = 15.0
) -> None:
    """Return when `predicate` holds; fail with `description` when it does not within `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = predicate()
        if isawaitable(value):
            value = await value
        if value:
            return
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {description}")
        await asyncio.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Whether a process, ours or an orphan, still runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # Whoever adopts an orphan may take its time to notice its end.
    with suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
