"""Memory: bytes of Redis for each short delta, and of the worker for each live generation."""

import asyncio

from redis.asyncio import Redis

from deltafan import Consumer, Producer
from measure import Bench, Report, rss_bytes, worker

HI = [{"role": "user", "content": "Hi"}]
LIVE = 1000


async def run(bench: Bench, report: Report) -> None:
    """A long stream for Redis; many live streams of 500 deltas for the worker."""
    redis: Redis = Redis.from_url(bench.redis_url)
    with worker(bench) as child:
        async with Producer.connect(bench.redis_url) as producer, Consumer.connect(bench.redis_url) as consumer:
            job = await producer.submit(model="b/bench-20000-0-50", messages=HI)
            await consumer.result(job.id, timeout=60)
            per_delta = await redis.memory_usage(f"deltafan:{{{job.id}}}:events", samples=0) / 20_000
            before = rss_bytes(child.pid)
            # 450 deltas at once, then 50 more slowly: alive, with most of an ordinary answer behind them.
            jobs = await producer.submit_many([{"model": "b/bench-500-1000-50", "messages": HI}] * LIVE)
            await asyncio.sleep(9)
            per_live = (rss_bytes(child.pid) - before) / LIVE / 1024
            await asyncio.gather(*[consumer.result(job.id, timeout=60) for job in jobs])
    await redis.aclose()
    report.add("Redis per short delta", f"{per_delta:.1f} bytes", "under 40 bytes", per_delta < 40)
    report.add("worker per live generation", f"{per_live:.1f} KiB at 450 deltas each", "under 50 KiB", per_live < 50)
