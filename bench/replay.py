"""Replay: entries per second that one reading process takes from a stored stream."""

import time

from redis.asyncio import Redis

from deltafan import Consumer
from measure import Bench, Report

ENTRIES = 200_000
EVENTS = "deltafan:{replay}:events"


async def run(bench: Bench, report: Report) -> None:
    """Tail a finished stream of short deltas from its start, three times; the median counts."""
    redis: Redis = Redis.from_url(bench.redis_url)
    await redis.xadd(EVENTS, {"type": "started", "data": "{}"}, id="5-0")
    for first in range(1, ENTRIES, 10_000):
        pipe = redis.pipeline(transaction=False)
        for seq in range(first, first + 10_000):
            pipe.xadd(EVENTS, {"type": "content", "data": " token"}, id=f"5-{seq}")
        await pipe.execute()
    await redis.xadd(EVENTS, {"type": "completed", "data": "{}"}, id=f"5-{ENTRIES + 1}")
    await redis.aclose()
    rates = []
    async with Consumer.connect(bench.redis_url) as consumer:
        for _ in range(3):
            start, count = time.perf_counter(), 0
            async with consumer.tail("replay") as events:
                async for _event in events:
                    count += 1
            rates.append(count / (time.perf_counter() - start))
    rate = sorted(rates)[1]
    report.add("replay", f"{rate:,.0f} entries/s", "200,000 entries/s", rate >= 200_000)
