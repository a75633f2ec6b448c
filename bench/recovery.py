"""Recovery: from a worker's SIGKILL to the first delta of the next attempt, under a 30-minute time limit."""

import asyncio
import time

from deltafan import Consumer, Producer
from measure import Bench, Report, worker

HI = [{"role": "user", "content": "Hi"}]
KILLS = 3


async def run(bench: Bench, report: Report) -> None:
    """Kill the worker that runs a job while another is idle."""
    settings = {"total_timeout_s": 1800, "concurrency": 1}
    times = []
    async with Producer.connect(bench.redis_url) as producer, Consumer.connect(bench.redis_url) as consumer:
        for _ in range(KILLS):
            job = await producer.submit(model="b/bench-2000-20-1", messages=HI)
            with worker(bench, **settings) as first:
                async with consumer.tail(job.id) as events:
                    async for event in events:
                        if event.text:
                            break
                    with worker(bench, **settings):
                        await asyncio.sleep(2)
                        first.kill()
                        killed = time.monotonic()
                        restarted = False
                        async for event in events:
                            restarted = restarted or event.type == "started"
                            if restarted and event.text:
                                break
                        else:
                            raise AssertionError(f"job {job.id} ended, with no delta of another attempt")
                        times.append(time.monotonic() - killed)
                        await producer.cancel(job.id)
    figure = ", ".join(f"{seconds:.1f} s" for seconds in times)
    report.add("SIGKILL to the next attempt's first delta", figure, "under 10 s", max(times) < 10)
    report.note("stock arq with a job_timeout of 30 minutes: 30 min 10 s, the length of its in-progress key")
