"""CPU per delta in the worker process, beside the naive loop on the same upstream in the same run."""

import asyncio
import sys
from subprocess import Popen
from typing import Any

from arq.connections import RedisSettings, create_pool

from deltafan import Consumer, Producer
from measure import HERE, Bench, Report, cpu_s, process, settle, worker

HI: Any = [{"role": "user", "content": "Hi"}]
STREAMS = 10
# Each delta in a packet of its own, far from the next; and twenty to a packet.
ALONE, ALONE_DELTAS = "bench-200-20-1", 200
BURSTS, BURSTS_DELTAS = "bench-2000-20-20", 2000


APIS = ("chat", "responses", "dashscope")


async def run(bench: Bench, report: Report) -> None:
    """Measure both loops in both patterns; ours with every API, the naive one with the one that its SDK streams."""
    shapes = ((ALONE, ALONE_DELTAS), (BURSTS, BURSTS_DELTAS))
    naive = {name: await _naive(bench, name, deltas) for name, deltas in shapes}
    with worker(bench) as child:
        ours = {(api, name): await _ours(bench, child, api, name, n) for api in APIS for name, n in shapes}
    for api in APIS:
        for what, name, least in (("alone", ALONE, 8), ("in bursts", BURSTS, 20)):
            ratio = naive[name] / ours[api, name]
            figure = f"{ours[api, name]:.1f} us against {naive[name]:.1f} us, {ratio:.1f} times less"
            budget = f"{least} times less than the naive loop"
            report.add(f"CPU per delta of {api}, arriving {what}", figure, budget, ratio >= least)
    floor = await _bare(bench, ALONE, ALONE_DELTAS)
    report.note(
        f"arriving alone, bare sockets that only copy: {floor:.1f} us, {naive[ALONE] / floor:.1f} times less than naive"
    )


async def _ours(bench: Bench, child: "Popen[bytes]", api: str, model: str, deltas: int) -> float:
    async with Producer.connect(bench.redis_url) as producer, Consumer.connect(bench.redis_url) as consumer:
        request: dict[str, Any] = {"model": f"b/{model}", "messages": HI, "api": api}
        warm = await producer.submit(**request)
        await consumer.result(warm.id, timeout=60)
        await settle()
        before = cpu_s(child.pid)
        jobs = await producer.submit_many([request] * STREAMS)
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


async def _bare(bench: Bench, model: str, deltas: int) -> float:
    command = [str(HERE / "bare.py"), "--redis-url", bench.redis_url, "--upstream-url", bench.upstream_url]
    command += ["--model", model, "--streams", str(STREAMS)]
    child = await asyncio.create_subprocess_exec(sys.executable, *command, stdout=asyncio.subprocess.PIPE)
    printed, _ = await child.communicate()
    return float(printed) / (STREAMS * deltas) * 1e6
