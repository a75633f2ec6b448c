"""Capacity: jobs running at once on 40 workers of 10 slots, and 2,000 live generations on one process."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

from arq.connections import ArqRedis
from arq.worker import Worker, func
from redis.asyncio import BlockingConnectionPool

from deltafan import Consumer, Producer
from deltafan._keys import Keys
from deltafan_worker._leased import LeasedWorker, WorkerOptions
from deltafan_worker._queue_pool import QueuePool, queue_pool
from deltafan_worker.serialization import deserialize, serialize
from measure import Bench, Report, cpu_s, worker

WORKERS, SLOTS = 40, 10
LIVE, RATE = 2000, 5
HI = [{"role": "user", "content": "Hi"}]


async def run(bench: Bench, report: Report) -> None:
    """Fill a fleet with jobs that do not end, count those that run; then one process with live streams."""
    ours = await _running(bench, stock=False)
    stock = await _running(bench, stock=True)
    full = WORKERS * SLOTS
    report.add("jobs running at once", f"{ours} of {full}", f"{full} of {full} on {WORKERS} x {SLOTS}", ours == full)
    report.note(f"stock arq: {stock} of {full}")
    await _live(bench, report)


async def _running(bench: Bench, *, stock: bool) -> int:
    running, end = [0], asyncio.Event()
    # Stock workers leave their clients open when they are cancelled, and redis-py says so once for each.
    asyncio.get_running_loop().set_exception_handler(lambda _loop, _context: None)

    async def hold(_ctx: dict[Any, Any]) -> None:
        running[0] += 1
        await end.wait()

    keys = Keys("stock" if stock else "ours")
    queue = keys.queue("interactive")
    async with AsyncExitStack() as stack:
        pools: list[Any] = [
            await stack.enter_async_context(_pool(bench.redis_url, stock=stock)) for _ in range(WORKERS)
        ]
        workers: list[Any] = [
            _stock_worker(hold, pool, queue) if stock else _our_worker(hold, pool, keys) for pool in pools
        ]
        for _ in range(WORKERS * SLOTS):
            await pools[0].enqueue_job("hold", _queue_name=queue)
        mains = [asyncio.create_task(one.main()) for one in workers]
        deadline = time.monotonic() + 10
        while running[0] < WORKERS * SLOTS and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        count = running[0]
        end.set()
        for main in mains:
            main.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*mains, return_exceptions=True)
        await pools[0].flushdb()
    return count


@asynccontextmanager
async def _pool(url: str, *, stock: bool) -> AsyncIterator[ArqRedis]:
    if not stock:
        async with queue_pool(url) as ours:
            yield ours
        return
    connections = BlockingConnectionPool.from_url(url, max_connections=50)
    pool = ArqRedis(connections, job_serializer=serialize, job_deserializer=deserialize)
    try:
        yield pool
    finally:
        await pool.aclose(close_connection_pool=True)


def _our_worker(hold: Any, pool: QueuePool, keys: Keys) -> LeasedWorker:
    options = WorkerOptions(name="w", queues=[keys.queue("interactive")], concurrency=SLOTS)
    return LeasedWorker([func(hold, name="hold")], options, pool=pool, keys=keys)


def _stock_worker(hold: Any, pool: ArqRedis, queue: str) -> Worker:
    return Worker(
        [func(hold, name="hold")],
        redis_pool=pool,
        queue_name=queue,
        max_jobs=SLOTS,
        handle_signals=False,
        job_serializer=serialize,
        job_deserializer=deserialize,
    )


async def _live(bench: Bench, report: Report) -> None:
    with worker(bench) as child:
        async with Producer.connect(bench.redis_url) as producer, Consumer.connect(bench.redis_url) as consumer:
            deltas = 16 * RATE
            jobs = await producer.submit_many([{"model": f"b/bench-{deltas}-{1000 // RATE}-1", "messages": HI}] * LIVE)
            await asyncio.sleep(9)
            states = [consumer.snapshot(job.id) for job in jobs]
            live = sum(state.status == "running" for state in await asyncio.gather(*states))
            before, start = cpu_s(child.pid), time.monotonic()
            await asyncio.sleep(3)
            busy = (cpu_s(child.pid) - before) / (time.monotonic() - start)
            started = time.monotonic()
            results = await asyncio.gather(*[consumer.result(job.id, timeout=60) for job in jobs])
            whole = sum(len(result.content) == deltas * len(" token") for result in results)
    late_s = time.monotonic() - started
    figure = f"{live} live at once, {whole} whole answers, {busy:.0%} of one core, done {late_s:.1f} s later"
    report.add("live generations on one process", figure, f"{LIVE} at {RATE} deltas/s", live == LIVE and whole == LIVE)
