"""Limits: four worker processes for four minutes, one limit on requests and one on tokens at once."""

import asyncio
import time
from bisect import bisect_left
from contextlib import ExitStack

from deltafan import Producer
from measure import Bench, Report, servers, worker

PER_MINUTE, WORKERS, MINUTES = 1200, 4, 4
TOKENS_PER_CALL = 110
"""As the upstream counts each answer."""
HI = [{"role": "user", "content": "Hi, what is this about? Say it in a hundred tokens."}]


async def run(bench: Bench, report: Report) -> None:
    """Each limit has a provider and an upstream of its own."""
    with servers() as other, ExitStack() as stack:
        models = bench.folder / "limited.toml"
        models.write_text(
            f'[providers.r]\nbase_url = "{bench.upstream_url}"\nlimits = {{ requests_per_minute = {PER_MINUTE} }}\n'
            f'[providers.t]\nbase_url = "{other.upstream_url}"\n'
            f"limits = {{ tokens_per_minute = {PER_MINUTE * TOKENS_PER_CALL} }}\n"
        )
        async with Producer.connect(bench.redis_url) as producer:
            # In turns: else workers would go through all rows of one limit, and park them, before they see the other's.
            rows = [{"model": f"{provider}/bench-5-20-1", "messages": HI, "lane": "batch"} for provider in ("r", "t")]
            await producer.submit_many(rows * (PER_MINUTE * (MINUTES + 1)))
            for _ in range(WORKERS):
                stack.enter_context(worker(bench, concurrency=50, models=models))
            await asyncio.sleep(5)
            started = time.time()
            await asyncio.sleep(MINUTES * 60)
            ended = time.time()
            for name, arrivals in (("requests", bench.arrivals()), ("tokens", other.arrivals())):
                _judge(report, name, arrivals, started, ended)


def _judge(report: Report, name: str, arrivals: list[float], started: float, ended: float) -> None:
    ordered = sorted(arrivals)
    most = max(bisect_left(ordered, at + 60) - index for index, at in enumerate(ordered)) / PER_MINUTE
    counted = sum(started <= at < ended for at in ordered)
    used = counted / PER_MINUTE / ((ended - started) / 60)
    figure = f"at most {most:.3f} of it in any minute, {used:.3f} of it used over {MINUTES} minutes"
    report.add(f"limit on {name}", figure, "at most 1.02, at least 0.95", most <= 1.02 and used >= 0.95)
