"""Pick-up: from submit to the request's arrival upstream, on an idle fleet; stock arq beside it."""

import asyncio
import time

from arq.connections import RedisSettings, create_pool

from deltafan import Consumer, Producer
from measure import HERE, Bench, Report, percentile, process, settle, spread_ms, worker

HI = [{"role": "user", "content": "Hi"}]
JOBS, STOCK_JOBS = 200, 30


async def run(bench: Bench, report: Report) -> None:
    """Submit one job at a time, each when the last has ended."""
    stock = await _stock(bench)
    with worker(bench):
        async with Producer.connect(bench.redis_url) as producer, Consumer.connect(bench.redis_url) as consumer:
            submitted: list[float] = []
            for index in range(JOBS + 5):
                if index == 5:
                    await settle()
                    bench.arrivals()
                    submitted.clear()
                submitted.append(time.time())
                job = await producer.submit(model="b/bench-2-0-1", messages=HI)
                await consumer.result(job.id, timeout=30)
                await asyncio.sleep(0.01)
    ours = [arrived - sent for arrived, sent in zip(bench.arrivals(), submitted, strict=True)]
    median_ms, p99_ms = percentile(ours, 50) * 1000, percentile(ours, 99) * 1000
    report.add("pick-up", spread_ms(ours), "median under 5 ms, p99 under 20 ms", median_ms < 5 and p99_ms < 20)
    report.note(f"stock arq: {spread_ms(stock)}; {percentile(stock, 50) / percentile(ours, 50):.0f} times ours")


async def _stock(bench: Bench) -> list[float]:
    pool = await create_pool(RedisSettings.from_dsn(bench.redis_url))
    submitted = []
    command = [str(HERE / "naive.py"), "--redis-url", bench.redis_url, "--upstream-url", bench.upstream_url]
    with process(command):
        warm = await pool.enqueue_job("generate", "bench-2-0-1", HI)
        assert warm is not None
        await warm.result(timeout=30)
        bench.arrivals()
        for index in range(STOCK_JOBS):
            # Not in step with its polling.
            await asyncio.sleep(0.137 + index % 7 * 0.05)
            submitted.append(time.time())
            job = await pool.enqueue_job("generate", "bench-2-0-1", HI)
            assert job is not None
            await job.result(timeout=30, poll_delay=0.02)
    await pool.aclose()
    return [arrived - sent for arrived, sent in zip(bench.arrivals(), submitted, strict=True)]
