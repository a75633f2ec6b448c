"""Lanes: pick-up of interactive jobs while 10,000 batch rows are queued and every worker is busy with them."""

import asyncio
import time
from contextlib import ExitStack
from pathlib import Path

from redis.asyncio import Redis

from deltafan import Consumer, Producer
from deltafan._keys import Keys
from measure import Bench, Report, percentile, servers, spread_ms, worker

ROWS, WORKERS, SLOTS = 10_000, 2, 100
JOBS = 300
HI = [{"role": "user", "content": "Hi"}]


async def run(bench: Bench, report: Report) -> None:
    """Batch jobs call an upstream of their own, so that arrivals at the other one are those of interactive jobs."""
    with servers() as other, ExitStack() as stack:
        models = _models(bench, other)
        async with Producer.connect(bench.redis_url) as producer, Consumer.connect(bench.redis_url) as consumer:
            rows = [{"model": "slow/bench-40-50-1", "messages": HI, "lane": "batch"}] * ROWS
            await producer.submit_many(rows)
            for _ in range(WORKERS):
                stack.enter_context(worker(bench, concurrency=SLOTS, models=models))
            await asyncio.sleep(4)
            bench.arrivals()
            submitted: list[float] = []
            for index in range(JOBS):
                submitted.append(time.time())
                job = await producer.submit(model="b/bench-2-0-1", messages=HI)
                await consumer.result(job.id, timeout=30)
                await asyncio.sleep(0.005 * (index % 7))
            waits = [arrived - sent for arrived, sent in zip(bench.arrivals(), submitted, strict=True)]
            queued = await _queued(bench)
    p99_ms = percentile(waits, 99) * 1000
    report.add("pick-up beside batches", spread_ms(waits), "p99 under 50 ms", p99_ms < 50)
    report.note(f"{queued:,} batch rows were queued still at the end")


def _models(bench: Bench, other: Bench) -> Path:
    path = bench.folder / "lanes.toml"
    path.write_text(
        f'[providers.b]\nbase_url = "{bench.upstream_url}"\n[providers.slow]\nbase_url = "{other.upstream_url}"\n'
    )
    return path


async def _queued(bench: Bench) -> int:
    async with Redis.from_url(bench.redis_url) as redis:
        return int(await redis.zcard(Keys("deltafan").queue("batch")))
