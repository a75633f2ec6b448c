"""CPU per delta in the worker process, beside the naive loop on the same upstream in the same run."""

import asyncio
import sys
from collections import defaultdict
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
TURNS = 6  # each API twice at each place
SHAPES = (("alone", ALONE, ALONE_DELTAS, 8), ("in bursts", BURSTS, BURSTS_DELTAS, 20))


async def run(bench: Bench, report: Report) -> None:
    """Measure both loops in both patterns; ours with every API, the naive one with the one that its SDK streams.

    In turn, each API once at each place, and the least of each: what else the machine does only ever adds, and differs
    from moment to moment; and a worker that has waited for the naive loop's end begins with cold caches.
    """
    naive, ours, floor = defaultdict[str, list[float]](list), defaultdict[tuple[str, str], list[float]](list), []
    with worker(bench) as child:
        for turn in range(TURNS):
            for _, model, deltas, _ in SHAPES:
                naive[model].append(await _naive(bench, model, deltas))
                for api in (*APIS[turn % 3 :], *APIS[: turn % 3]):
                    ours[api, model].append(await _ours(bench, child, api, model, deltas))
            floor.append(await _bare(bench, ALONE, ALONE_DELTAS))
    for api in APIS:
        for what, model, _, least in SHAPES:
            theirs_us, ours_us = min(naive[model]), min(ours[api, model])
            ratio = theirs_us / ours_us
            figure = f"{ours_us:.1f} us against {theirs_us:.1f} us, {ratio:.1f} times less"
            budget = f"{least} times less than the naive loop"
            report.add(f"CPU per delta of {api}, arriving {what}", figure, budget, ratio >= least)
    least_us, ratio = min(floor), min(naive[ALONE]) / min(floor)
    report.note(f"arriving alone, bare sockets that only copy: {least_us:.1f} us, {ratio:.1f} times less than naive")


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
