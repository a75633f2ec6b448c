"""The queue's connections, where their client library falls short."""

import asyncio

from deltafan_worker._queue_pool import queue_pool


def cancel_after(steps: int, task: asyncio.Task[None]) -> None:
    """Cancel it when the loop has turned so often."""
    if steps:
        asyncio.get_running_loop().call_soon(cancel_after, steps - 1, task)
    else:
        task.cancel()


async def test_a_cancel_is_never_forgotten_whenever_it_comes(redis_url: str) -> None:
    async with queue_pool(redis_url) as pool:

        async def ask_for_ever() -> None:
            while True:
                assert await pool.echo("x") == b"x"

        for steps in [*range(60)] * 10:
            task = asyncio.create_task(ask_for_ever())
            cancel_after(steps, task)
            done, _ = await asyncio.wait([task], timeout=5)
            assert done, f"cancelled after {steps} steps of the loop, it went on"
            assert task.cancelled(), "its replies are its own"
