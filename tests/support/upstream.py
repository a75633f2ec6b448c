"""A model server for tests: real HTTP, scripted answers, Chat Completions as OpenAI's API streams them.

A script is a list of steps; each request takes the next script of the queue, or else the one its model's name asks for
(`sim-<deltas>x<gap_ms>`), or else the standing one. Tests hold a generation at an `Event` of theirs instead of
sleeping. An answer without `[DONE]`, an error in a 200, a usage of another shape are scripts like any other.

`python tests/support/upstream.py` is the same as a process: it prints its URL as JSON and ends with its standard input.
"""

import asyncio
import json
import re
import sys
from argparse import ArgumentParser
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import orjson
from aiohttp import web

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from support.waiting import simulated_delay

USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12, "prompt_tokens_details": {"cached_tokens": 2}}


@dataclass(frozen=True)
class Refuse:
    """Answer with an HTTP error instead of a stream."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Raw:
    """Bytes as they are, in one write."""

    data: bytes


@dataclass(frozen=True)
class Gap:
    """Time that the model takes. For load; a test that wants an order uses an `Event`."""

    seconds: float


class Cut:
    """Break the connection here."""


Frame: TypeAlias = Mapping[str, Any] | Raw
Step: TypeAlias = Frame | Gap | Cut | asyncio.Event
Script: TypeAlias = Sequence[Step] | Refuse

DONE = Raw(b"data: [DONE]\n\n")
COMMENT = Raw(b": keep-alive\n\n")


def text(*pieces: str, finish: str = "stop", usage: Mapping[str, Any] | None = USAGE) -> list[Frame]:
    """An ordinary answer: one content delta a piece, finish, usage, [DONE]."""
    return [opening(), *(delta(content=piece) for piece in pieces), *ending(finish, usage)]


def paced(deltas: int, gap_s: float) -> list[Step]:
    """An answer of so many deltas, each after a gap."""
    steps = (step for number in range(deltas) for step in (Gap(gap_s), delta(content=f"{number} ")))
    return [opening(), *steps, *ending()]


def opening() -> Frame:
    return chunk({"delta": {"role": "assistant", "content": ""}})


def delta(**fields: Any) -> Frame:
    return chunk({"delta": fields})


def ending(finish: str = "stop", usage: Mapping[str, Any] | None = USAGE) -> list[Frame]:
    steps: list[Frame] = [chunk({"delta": {}, "finish_reason": finish})]
    if usage is not None:
        steps.append(chunk(None, usage=dict(usage)))
    return [*steps, DONE]


def chunk(choice: Mapping[str, Any] | None, **fields: Any) -> dict[str, Any]:
    choices = [] if choice is None else [{"index": 0, "finish_reason": None, "logprobs": None, **choice}]
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "sim"}
    return {**head, "choices": choices, "usage": None, **fields}


def frame(step: Frame) -> bytes:
    """What this step writes."""
    return step.data if isinstance(step, Raw) else b"data: " + orjson.dumps(dict(step)) + b"\n\n"


def at_once(steps: Iterable[Frame]) -> Raw:
    """These frames in one write."""
    return Raw(b"".join(map(frame, steps)))


def byte_by_byte(steps: Iterable[Frame]) -> Iterator[Step]:
    """These frames in writes of one byte, each on its way before the next."""
    for byte in at_once(steps).data:
        yield Raw(bytes([byte]))
        yield Gap(0)


@dataclass
class Request:
    """What arrived, and what became of it."""

    body: dict[str, Any]
    headers: dict[str, str]
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """The answer was sent whole, or the client has gone away."""
    was_cut: bool = False
    """The client went away first."""

    def as_json(self) -> dict[str, Any]:
        """For those who look from another process."""
        return {"body": self.body, "headers": self.headers, "ended": self.ended.is_set(), "was_cut": self.was_cut}


class ScriptedUpstream:
    """Give it scripts, look at its requests."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.arrived = asyncio.Event()
        self.standing: Script = text("Hello", ", ", "world", "!")
        self._queue: deque[Script] = deque()
        self.url = ""

    def then(self, *scripts: Script) -> None:
        """Answer the next requests with these, one each."""
        self._queue.extend(scripts)

    async def handle(self, http: web.Request) -> web.StreamResponse:
        request = Request(orjson.loads(await http.read()), dict(http.headers))
        self.requests.append(request)
        self.arrived.set()
        script = self._script_for(request)
        if isinstance(script, Refuse):
            request.ended.set()
            return web.Response(status=script.status, body=script.body, headers=dict(script.headers))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        try:
            await response.prepare(http)
            await self._play(script, response, http)
        except (ConnectionError, asyncio.CancelledError):
            request.was_cut = True
            raise
        finally:
            request.ended.set()
        return response

    async def list_requests(self, _http: web.Request) -> web.Response:
        return web.json_response([request.as_json() for request in self.requests])

    def _script_for(self, request: Request) -> Script:
        if self._queue:
            return self._queue.popleft()
        if named := re.fullmatch(r"sim-(\d+)x(\d+)", str(request.body.get("model"))):
            return paced(int(named[1]), int(named[2]) / 1000)
        return self.standing

    async def _play(self, script: Sequence[Step], response: web.StreamResponse, http: web.Request) -> None:
        for step in script:
            if isinstance(step, asyncio.Event):
                await step.wait()
            elif isinstance(step, Gap):
                await simulated_delay(step.seconds)
            elif isinstance(step, Cut):
                assert http.transport is not None
                http.transport.abort()
                return
            else:
                await response.write(frame(step))


@asynccontextmanager
async def scripted_upstream(port: int = 0) -> AsyncIterator[ScriptedUpstream]:
    """An upstream on loopback, in this event loop. GET /_requests tells another process what `requests` tells this."""
    upstream = ScriptedUpstream()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", upstream.handle)
    app.router.add_get("/_requests", upstream.list_requests)
    # handler_cancellation: a request's handler ends when its client goes away, which is what tests look for.
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    host, bound_port = runner.addresses[0][:2]
    upstream.url = f"http://{host}:{bound_port}/v1"
    try:
        yield upstream
    finally:
        await runner.cleanup()


async def _serve(port: int) -> None:
    async with scripted_upstream(port) as upstream:
        print(json.dumps({"url": upstream.url}), flush=True)  # noqa: T201  for whoever started this
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 picks a free one")
    asyncio.run(_serve(parser.parse_args().port))
