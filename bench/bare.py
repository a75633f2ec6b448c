"""The floor: sockets that copy each packet of an answer into a stream, and do nothing else at all.

No queue, no HTTP client, no decoder, no reply is looked at: on the machine at hand no Python process that wakes up for
each packet can cost less. `python bench/bare.py --redis-url … --upstream-url … --model M --streams N` makes that many
calls at once and prints the CPU time that they took, in seconds.
"""

import asyncio
import json
import time
from argparse import ArgumentParser
from typing import cast
from urllib.parse import urlsplit

import hiredis
import uvloop


class Redis(asyncio.Protocol):
    """Appends; replies are parsed and dropped."""

    def __init__(self) -> None:
        self._replies = hiredis.Reader()
        self._count = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        self._replies.feed(data)
        while self._replies.gets() is not False:
            pass

    def append(self, data: bytes) -> None:
        """Add an entry and ring."""
        self._count += 1
        entry = hiredis.pack_command(("XADD", "bare", f"1-{self._count}", "type", "content", "data", data))  # type: ignore[arg-type]
        self._transport.write(entry + hiredis.pack_command(("PUBLISH", "bare:bell", "")))  # type: ignore[arg-type]


class Answer(asyncio.Protocol):
    """One answer, copied packet by packet."""

    def __init__(self, request: bytes, redis: Redis) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._redis = redis

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        self._redis.append(data[-80:-60])
        if data.endswith(b"0\r\n\r\n"):
            self._transport.close()
            self.ended.set_result(None)


async def copy(redis_url: str, upstream_url: str, model: str, streams: int) -> float:
    """Make the calls; returns the CPU time of this process while they went on, in seconds."""
    loop = asyncio.get_running_loop()
    body = json.dumps({"model": model, "stream": True}).encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    transport, redis = await loop.create_connection(Redis, *_address(redis_url))
    before = time.process_time()
    answers = []
    for _ in range(streams):
        make = lambda: Answer(request, redis)  # noqa: E731
        _, answer = await loop.create_connection(make, *_address(upstream_url))
        answers.append(answer)
    await asyncio.gather(*[answer.ended for answer in answers])
    spent = time.process_time() - before
    transport.close()
    return spent


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "127.0.0.1", parts.port or 6379


def main() -> None:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--redis-url", required=True)
    parser.add_argument("--upstream-url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--streams", type=int, default=10)
    args = parser.parse_args()
    print(uvloop.run(copy(args.redis_url, args.upstream_url, args.model, args.streams)))


if __name__ == "__main__":
    main()
