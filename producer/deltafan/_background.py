"""A task with an owner: it lives as long as the block that opened it."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any


@asynccontextmanager
async def background(work: Coroutine[Any, Any, None], name: str) -> AsyncIterator[asyncio.Task[None]]:
    """Run `work` beside the block and cancel it at the block's end.

    Unlike a TaskGroup it leaves the block's own exceptions as they are, which is what a caller's
    `except JobFailed` needs. An exception of `work` is raised at the end of the block.
    """
    task = asyncio.create_task(work, name=name)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error
