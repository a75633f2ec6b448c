"""Workers show that they live, and nobody needs to look at every key to see it."""

import os
import socket
import time
from pathlib import Path

from redis.asyncio import Redis

from deltafan._workers import living_workers
from support.waiting import wait_until
from support.workers import running_worker, settings_env


async def test_who_has_not_shown_himself_lately_is_not_alive_and_is_forgotten(
    redis: Redis, redis_url: str, tmp_path: Path
) -> None:
    await redis.zadd("deltafan:workers", {"elsewhere:1": time.time() - 20})
    await redis.pexpire("deltafan:workers", 60_000)
    assert await living_workers(redis_url) == []
    async with running_worker(settings_env(redis_url, "http://127.0.0.1:1/v1", tmp_path)):
        await wait_until(lambda: redis.exists(f"deltafan:worker:{socket.gethostname()}:{os.getpid()}"), "it shows")
        assert await living_workers(redis_url) == [f"{socket.gethostname()}:{os.getpid()}"]
        assert await redis.zcard("deltafan:workers") == 1
        assert 10 < await redis.ttl("deltafan:workers") <= 15
    assert await living_workers(redis_url, prefix="other") == []
