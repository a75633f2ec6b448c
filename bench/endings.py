"""Endings: from a cancel to the closed upstream connection, and from SIGTERM to the next attempt's first delta."""

import asyncio
import statistics
import time

from deltafan import Consumer, Producer
from deltafan._events import Event
from deltafan._tail import Tail
from measure import Bench, Report, spread_ms, worker

HI = [{"role": "user", "content": "Hi"}]
CANCELS = 50
HAND_OVERS = 3


async def run(bench: Bench, report: Report) -> None:
    """End jobs in both ways."""
    cancels = await _cancels(bench)
    report.add(
        "cancel to closed upstream connection",
        spread_ms(cancels),
        "median under 100 ms",
        statistics.median(cancels) < 0.1,
    )
    hand_overs = await _hand_overs(bench)
    figure = ", ".join(f"{seconds * 1000:.0f} ms" for seconds in hand_overs)
    report.add("SIGTERM to the next attempt's first delta", figure, "under 1 s", max(hand_overs) < 1)


async def _cancels(bench: Bench) -> list[float]:
    times = []
    async with Producer.connect(bench.redis_url) as producer, Consumer.connect(bench.redis_url) as consumer:
        with worker(bench):
            for _ in range(CANCELS):
                job = await producer.submit(model="b/bench-2000-20-1", messages=HI)
                async with consumer.tail(job.id) as events:
                    await _first_text(events)
                    bench.departures()
                    asked = time.time()
                    await producer.cancel(job.id)
                    async for _event in events:
                        pass
                while not (gone := bench.departures()):
                    await asyncio.sleep(0.01)
                times.append(gone[0] - asked)
    return times


async def _hand_overs(bench: Bench) -> list[float]:
    times = []
    settings = {"drain_timeout_s": 0, "concurrency": 1}
    async with Producer.connect(bench.redis_url) as producer, Consumer.connect(bench.redis_url) as consumer:
        for _ in range(HAND_OVERS):
            job = await producer.submit(model="b/bench-2000-20-1", messages=HI)
            with worker(bench, **settings) as first:
                async with consumer.tail(job.id) as events:
                    await _first_text(events)
                    with worker(bench, **settings):
                        await asyncio.sleep(2)
                        first.terminate()
                        told = time.monotonic()
                        async for event in events:
                            if event.type == "started":
                                break
                        await _first_text(events)
                        times.append(time.monotonic() - told)
                        await producer.cancel(job.id)
    return times


async def _first_text(events: Tail) -> Event:
    async for event in events:
        if event.text:
            return event
    raise AssertionError("the job ended before it had said anything")
