"""A model server on loopback that plays scripts over real HTTP."""

import asyncio
import re
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import orjson
from aiohttp import web

from deltafan.testing import chat
from deltafan.testing._steps import Cut, Gap, Refuse, Step, simulated_delay

Script: TypeAlias = Sequence[Step] | Refuse


@dataclass
class Request:
    """What arrived, and what became of it."""

    body: dict[str, Any]
    headers: dict[str, str]
    path: str = ""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """The answer was sent whole, or the client has gone away."""
    was_cut: bool = False
    """The client went away first."""

    def as_json(self) -> dict[str, Any]:
        """For those who look from another process."""
        fields = {"path": self.path, "body": self.body, "headers": self.headers}
        return {**fields, "ended": self.ended.is_set(), "was_cut": self.was_cut}


class ScriptedUpstream:
    """Give it scripts, look at its requests."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.arrived = asyncio.Event()
        self.standing: Script = chat.text("Hello", ", ", "world", "!")
        self._queue: deque[Script] = deque()
        self.url = ""

    def then(self, *scripts: Script) -> None:
        """Answer the next requests with these, one each."""
        self._queue.extend(scripts)

    async def handle(self, http: web.Request) -> web.StreamResponse:
        """Answer with the next script."""
        request = Request(orjson.loads(await http.read()), dict(http.headers), http.path)
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
        """What `requests` holds, for another process."""
        return web.json_response([request.as_json() for request in self.requests])

    def _script_for(self, request: Request) -> Script:
        if self._queue:
            return self._queue.popleft()
        if named := re.fullmatch(r"sim-(\d+)x(\d+)", str(request.body.get("model"))):
            return chat.paced(int(named[1]), int(named[2]) / 1000)
        return self.standing

    async def _play(self, script: Sequence[Step], response: web.StreamResponse, http: web.Request) -> None:
        for step in script:
            if isinstance(step, asyncio.Event):
                await step.wait()
            elif isinstance(step, Gap):
                await simulated_delay(step.seconds)
            elif isinstance(step, Cut):
                if http.transport is not None:
                    http.transport.abort()
                return
            else:
                await response.write(chat.frame(step))


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
