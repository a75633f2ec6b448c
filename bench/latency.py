"""Latency from the upstream's socket to the reader at 5,000 deltas/s over 250 streams; what readers cost the writer."""

import asyncio
import time

from deltafan import Consumer, Producer
from measure import Bench, Report, cpu_s, percentile, spread_ms, worker

STREAMS, GAP_MS, SECONDS = 250, 50, 8
DELTAS = SECONDS * 1000 // GAP_MS
HI = [{"role": "user", "content": "Hi"}]
READERS = 20
TURNS = 3


async def run(bench: Bench, report: Report) -> None:
    """Every delta carries the time of its sending."""
    with worker(bench) as child:
        async with Producer.connect(bench.redis_url) as producer, Consumer.connect(bench.redis_url) as consumer:
            delays = await _delays(producer, consumer)
            median_ms, p99_ms = percentile(delays, 50) * 1000, percentile(delays, 99) * 1000
            met = median_ms < 2 and p99_ms < 10
            report.add("upstream socket to reader", spread_ms(delays), "median under 2 ms, p99 under 10 ms", met)
            # In turn, and the least of each: what else the machine does only ever adds.
            turns = [(await _writer_cpu(producer, consumer, child.pid, n), n) for n in (0, READERS) * TURNS]
            alone, read = (min(cost for cost, readers in turns if readers == n) for n in (0, READERS))
    change = read / alone - 1
    figure = f"{alone:.1f} us per delta without readers, {read:.1f} us with {READERS} on each stream ({change:+.0%})"
    report.add("cost of a reader to the writer", figure, "none (within 10 % of noise)", change < 0.1)


async def _delays(producer: Producer, consumer: Consumer) -> list[float]:
    delays: list[float] = []

    async def read(job_id: str) -> None:
        async with consumer.tail(job_id) as events:
            async for event in events:
                now = time.time()
                if event.type == "content" and event.position.seq > DELTAS // 4:
                    delays.append(now - float(event.text))

    model = f"b/stamped-bench-{DELTAS}-{GAP_MS}-1"
    # One by one, so that the streams do not beat in step.
    jobs = [await producer.submit(model=model, messages=HI) for _ in range(STREAMS)]
    await asyncio.gather(*[read(job.id) for job in jobs])
    return delays


async def _writer_cpu(producer: Producer, consumer: Consumer, pid: int, readers: int) -> float:
    async def read(job_id: str) -> None:
        async with consumer.tail(job_id) as events:
            async for _ in events:
                pass

    before = cpu_s(pid)
    jobs = await producer.submit_many([{"model": "b/bench-200-20-1", "messages": HI}] * 20)
    await asyncio.gather(*[read(job.id) for job in jobs for _ in range(readers)])
    await asyncio.gather(*[consumer.result(job.id, timeout=60) for job in jobs])
    return (cpu_s(pid) - before) / (20 * 200) * 1e6
