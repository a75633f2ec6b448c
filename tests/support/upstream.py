"""A model server for tests: real HTTP, scripted answers, Chat Completions as OpenAI's API streams them.

A script is a list of steps; each request takes the next script of the queue, or the standing one. Tests hold a
generation at an `Event` of theirs instead of sleeping.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import orjson
from aiohttp import web

USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12, "prompt_tokens_details": {"cached_tokens": 2}}


@dataclass(frozen=True)
class Refuse:
    """Answer with an HTTP error instead of a stream."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Raw:
    """Bytes as they are."""

    data: bytes


class Cut:
    """Break the connection here."""


Step: TypeAlias = Mapping[str, Any] | Raw | Cut | asyncio.Event
Script: TypeAlias = Sequence[Step] | Refuse


def text(*pieces: str, finish: str = "stop", usage: Mapping[str, Any] | None = USAGE) -> list[Step]:
    """An ordinary answer: one content delta a piece, finish, usage, [DONE]."""
    return [opening(), *(delta(content=piece) for piece in pieces), *ending(finish, usage)]


def opening() -> Step:
    return chunk({"delta": {"role": "assistant", "content": ""}})


def delta(**fields: Any) -> Step:
    return chunk({"delta": fields})


def ending(finish: str = "stop", usage: Mapping[str, Any] | None = USAGE) -> list[Step]:
    steps: list[Step] = [chunk({"delta": {}, "finish_reason": finish})]
    if usage is not None:
        steps.append(chunk(None, usage=dict(usage)))
    return [*steps, Raw(b"data: [DONE]\n\n")]


def chunk(choice: Mapping[str, Any] | None, **fields: Any) -> dict[str, Any]:
    choices = [] if choice is None else [{"index": 0, "finish_reason": None, "logprobs": None, **choice}]
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "sim"}
    return {**head, "choices": choices, "usage": None, **fields}


@dataclass
class Request:
    """What arrived, and what became of it."""

    body: dict[str, Any]
    headers: dict[str, str]
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """The answer was sent whole, or the client has gone away."""
    was_cut: bool = False
    """The client went away first."""


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
        script = self._queue.popleft() if self._queue else self.standing
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

    async def _play(self, script: Sequence[Step], response: web.StreamResponse, http: web.Request) -> None:
        for step in script:
            if isinstance(step, asyncio.Event):
                await step.wait()
            elif isinstance(step, Raw):
                await response.write(step.data)
            elif isinstance(step, Cut):
                assert http.transport is not None
                http.transport.abort()
                return
            else:
                await response.write(b"data: " + orjson.dumps(dict(step)) + b"\n\n")


@asynccontextmanager
async def scripted_upstream() -> AsyncIterator[ScriptedUpstream]:
    upstream = ScriptedUpstream()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", upstream.handle)
    # handler_cancellation: a request's handler ends when its client goes away, which is what tests look for.
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    upstream.url = f"http://{host}:{port}/v1"
    try:
        yield upstream
    finally:
        await runner.cleanup()
