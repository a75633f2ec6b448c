"""Workers show that they live, and nobody needs to look at every key to see it."""

import os
import socket
import time
from pathlib import Path

import pytest
from redis.asyncio import Redis

from deltafan._workers import Worker, living_workers
from support.waiting import wait_until
from support.workers import running_worker, settings_env


@pytest.mark.parametrize("off_s", [0, -60, 60])
async def test_who_has_not_shown_himself_lately_is_not_alive_and_is_forgotten_whatever_clocks_say(
    redis: Redis, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, off_s: float
) -> None:
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + off_s)
    seconds, _ = await redis.time()
    await redis.zadd("deltafan:workers", {"elsewhere:1": seconds - 20})
    await redis.pexpire("deltafan:workers", 60_000)
    assert await living_workers(redis_url) == []
    await redis.set("deltafan:worker:elsewhere:1", '{"running": 2, "slots": 3}', ex=60)
    assert await living_workers(redis_url) == [Worker("elsewhere:1", running=2, slots=3)], "its load alone tells"
    await redis.delete("deltafan:worker:elsewhere:1")
    me = f"{socket.gethostname()}:{os.getpid()}"
    async with running_worker(settings_env(redis_url, "http://127.0.0.1:1/v1", tmp_path, concurrency=7)):
        await wait_until(lambda: redis.exists(f"deltafan:worker:{me}"), "it shows")
        assert await living_workers(redis_url) == [Worker(me, running=0, slots=7)]
        assert seconds <= (await redis.zscore("deltafan:workers", me) or 0) < seconds + 30
        assert await redis.zcard("deltafan:workers") == 1
        assert 10 < await redis.ttl("deltafan:workers") <= 15
    assert await living_workers(redis_url, prefix="other") == []
