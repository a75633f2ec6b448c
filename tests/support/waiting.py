"""The one place where tests sleep."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from inspect import isawaitable


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
