"""The simulated model server as a process: prints its URLs as JSON, ends with its standard input."""

import asyncio
import json
import sys
from argparse import ArgumentParser

from deltafan.testing import scripted_upstream


async def _serve(port: int) -> None:
    async with scripted_upstream(port) as upstream:
        urls = {
            "url": upstream.url,
            "compatible_url": upstream.compatible_url,
            "dashscope_url": upstream.dashscope_url,
        }
        print(json.dumps(urls), flush=True)  # noqa: T201  for whoever started this
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    parser = ArgumentParser(prog="python -m deltafan.testing", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 picks a free one")
    asyncio.run(_serve(parser.parse_args().port))
