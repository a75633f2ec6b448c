"""The queue's connections, where their client library falls short."""

import asyncio
from pathlib import Path

from deltafan import Consumer, Producer
from deltafan.testing import ScriptedUpstream
from deltafan_worker._queue_pool import queue_pool
from support.valkey import valkey_server
from support.workers import running_worker, settings_env


def cancel_after(steps: int, task: asyncio.Task[None]) -> None:
    """Cancel it when the loop has turned so often."""
    if steps:
        asyncio.get_running_loop().call_soon(cancel_after, steps - 1, task)
    else:
        task.cancel()


async def test_a_job_runs_over_a_socket_file(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    with valkey_server(unixsocket=str(tmp_path / "valkey.sock")):
        url = f"unix://{tmp_path}/valkey.sock?db=1"
        async with Producer.connect(url) as producer, Consumer.connect(url) as consumer:
            job = await producer.submit(model="sim", messages=[{"role": "user", "content": "Hi"}])
            async with running_worker(settings_env(url, upstream.url, tmp_path), burst=True):
                assert (await consumer.result(job.id, timeout=10)).content == "Hello, world!"


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
