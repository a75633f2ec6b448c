"""The baseline: the loop that most teams write, kept honest.

A stock arq worker, the vendor's SDK with its default transport and its chunk objects, one awaited XADD for each
delta, usage in a hash at the end; uvloop, as a competent team would. It does less than deltafan does: nothing is
fenced, healed, retried or billed exactly once, nobody is woken, a killed worker's job waits for the longest timeout.

`python bench/naive.py --redis-url … --upstream-url … --concurrency N` works until it is terminated.
"""

import asyncio
import logging
from argparse import ArgumentParser
from typing import Any

import uvloop
from arq.connections import RedisSettings
from arq.worker import Worker
from openai import AsyncOpenAI


async def generate(ctx: dict[Any, Any], model: str, messages: list[Any]) -> str:
    """Stream one answer into Redis."""
    redis, client = ctx["redis"], ctx["client"]
    key = f"naive:{ctx['job_id']}"
    usage: dict[str, int] = {}
    stream = await client.chat.completions.create(
        model=model, messages=messages, stream=True, stream_options={"include_usage": True}
    )
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            await redis.xadd(key, {"type": "content", "data": chunk.choices[0].delta.content})
        if chunk.usage:
            usage = {"input": chunk.usage.prompt_tokens, "output": chunk.usage.completion_tokens}
    await redis.xadd(key, {"type": "done", "data": ""})
    await redis.hset(f"{key}:usage", mapping=usage)
    await redis.expire(key, 3600)
    return "done"


def main() -> None:
    """Run the worker."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--redis-url", required=True)
    parser.add_argument("--upstream-url", required=True)
    parser.add_argument("--concurrency", type=int, default=10)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    worker = Worker(
        [generate],
        redis_settings=RedisSettings.from_dsn(args.redis_url),
        max_jobs=args.concurrency,
        ctx={"client": AsyncOpenAI(api_key="none", base_url=args.upstream_url)},
    )
    worker.run()


if __name__ == "__main__":
    main()
