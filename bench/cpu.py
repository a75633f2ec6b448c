"""CPU per delta in the worker process, beside the naive loop on the same upstream in the same run."""

import asyncio
from subprocess import Popen

from arq.connections import RedisSettings, create_pool

from deltafan import Consumer, Producer
from measure import HERE, Bench, Report, cpu_s, process, settle, worker

HI = [{"role": "user", "content": "Hi"}]
STREAMS = 10
# Each delta in a packet of its own, far from the next; and twenty to a packet.
ALONE, ALONE_DELTAS = "bench-200-20-1", 200
BURSTS, BURSTS_DELTAS = "bench-2000-20-20", 2000


async def run(bench: Bench, report: Report) -> None:
    """Measure both loops in both patterns."""
    naive = {
        name: await _naive(bench, name, deltas) for name, deltas in ((ALONE, ALONE_DELTAS), (BURSTS, BURSTS_DELTAS))
    }
    with worker(bench) as child:
        ours = {
            name: await _ours(bench, child, name, n) for name, n in ((ALONE, ALONE_DELTAS), (BURSTS, BURSTS_DELTAS))
        }
    for what, name, least in (("alone", ALONE, 8), ("in bursts", BURSTS, 20)):
        ratio = naive[name] / ours[name]
        figure = f"{ours[name]:.1f} us against {naive[name]:.1f} us, {ratio:.1f} times less"
        report.add(f"CPU per delta, arriving {what}", figure, f"{least} times less than the naive loop", ratio >= least)


async def _ours(bench: Bench, child: "Popen[bytes]", model: str, deltas: int) -> float:
    async with Producer.connect(bench.redis_url) as producer, Consumer.connect(bench.redis_url) as consumer:
        warm = await producer.submit(model=f"b/{model}", messages=HI)
        await consumer.result(warm.id, timeout=60)
        await settle()
        before = cpu_s(child.pid)
        jobs = await producer.submit_many([{"model": f"b/{model}", "messages": HI}] * STREAMS)
        await asyncio.gather(*[consumer.result(job.id, timeout=120) for job in jobs])
        await settle(0.2)
        return (cpu_s(child.pid) - before) / (STREAMS * deltas) * 1e6


async def _naive(bench: Bench, model: str, deltas: int) -> float:
    command = [str(HERE / "naive.py"), "--redis-url", bench.redis_url, "--upstream-url", bench.upstream_url]
    pool = await create_pool(RedisSettings.from_dsn(bench.redis_url))
    with process([*command, "--concurrency", str(STREAMS)]) as child:
        warm = await pool.enqueue_job("generate", model, HI)
        assert warm is not None
        await warm.result(timeout=60)
        await settle()
        before = cpu_s(child.pid)
        jobs = [await pool.enqueue_job("generate", model, HI) for _ in range(STREAMS)]
        for job in jobs:
            assert job is not None
            await job.result(timeout=120)
        spent = cpu_s(child.pid) - before
    await pool.aclose()
    return spent / (STREAMS * deltas) * 1e6
