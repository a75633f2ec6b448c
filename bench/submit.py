"""Bulk submit: jobs per second from one process."""

import time

from deltafan import Producer
from measure import Bench, Report

JOBS = 20_000


async def run(bench: Bench, report: Report) -> None:
    """Submit small jobs in bulk, three times; the median counts."""
    rates = []
    async with Producer.connect(bench.redis_url) as producer:
        for turn in range(3):
            requests = [{"model": "m", "messages": [{"role": "user", "content": f"{turn} {n}"}]} for n in range(JOBS)]
            start = time.perf_counter()
            await producer.submit_many(requests)
            rates.append(JOBS / (time.perf_counter() - start))
    rate = sorted(rates)[1]
    report.add("bulk submit", f"{rate:,.0f} jobs/s", "20,000 jobs/s", rate >= 20_000)
