"""The model server of the chaos runs, a process of its own: `python chaos/model_server.py` prints its URL as JSON.

The prompt says what to answer, `<number>:<deltas>:<gap_ms>:<thoughts>`, and each delta tells whose it is:
`<number>.<call>.<index>;`, where `call` counts the requests for that number. So the truth is known for every
transcript, and one that mixes two calls can be seen. The first `thoughts` deltas are reasoning. A request that ends
with the beginning of an answer (`partial`) gets the rest of it.

Through a port of its own: POST /faults arms faults for the next requests, one each; POST /refuse refuses all requests
for some time; POST /close refuses connections. GET /calls tells how often each number was asked for.
"""

import asyncio
import json
import re
import socket
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

import orjson
import uvloop
from aiohttp import web

REFUSALS = {"limit": 429, "down": 503, "broken": 500}
RETRY_AFTER_MS = "250"
"""So that a worker's tries last longer than any of these faults."""
PORTION = 25
"""Deltas in one write where nothing is between them."""
ENDLESS = 1_000_000


@dataclass(frozen=True, slots=True)
class Answer:
    """What one call gets."""

    number: int
    call: int
    start: int
    deltas: int
    gap_s: float
    thoughts: int
    fault: str

    @property
    def breaks_at(self) -> int:
        """Where the fault strikes: in the middle of what is left."""
        return self.start + (self.deltas - self.start) // 2 if self.fault else -1

    def delta(self, index: int) -> bytes:
        """One of its frames."""
        kind = "reasoning_content" if index < self.thoughts else "content"
        return frame({kind: f"{self.number}.{self.call}.{index};"})

    def end(self) -> bytes:
        """Its last frames."""
        said = self.deltas - self.start
        usage = {"prompt_tokens": 5, "completion_tokens": said, "total_tokens": 5 + said}
        return frame({}, "stop") + b"data: " + orjson.dumps({"choices": [], "usage": usage}) + b"\n\ndata: [DONE]\n\n"


class Upstream:
    """Answers, counts, and fails when told to."""

    def __init__(self) -> None:
        self.begun: Counter[int] = Counter()
        self.whole: Counter[int] = Counter()
        self.endless: Counter[int] = Counter()
        self._faults: deque[str] = deque()
        self._broken = 0
        self._refused_until = 0.0
        self._refusal = ""

    async def arm(self, http: web.Request) -> web.Response:
        """The names of the faults of the next requests, one each."""
        self._faults.extend(await http.json())
        return web.Response()

    async def refuse(self, http: web.Request) -> web.Response:
        """The name of a refusal, and for how many seconds."""
        self.refuse_for(*await http.json())
        return web.Response()

    def refuse_for(self, refusal: str, seconds: float) -> None:
        """Refuse every request from now on."""
        self._refusal, self._refused_until = refusal, time.monotonic() + seconds

    async def count(self, _http: web.Request) -> web.Response:
        """Calls by number, and how many in all were broken."""
        counts = {"begun": self.begun, "whole": self.whole, "endless": self.endless}
        return web.json_response(counts | {"broken": {0: self._broken}})

    async def generate(self, http: web.Request) -> web.StreamResponse:
        """One model call."""
        messages = orjson.loads(await http.read())["messages"]
        fault = self._next_fault()
        self._broken += bool(fault)
        if fault in REFUSALS:
            error = {"error": {"message": "asked to fail", "code": fault}}
            return web.json_response(error, status=REFUSALS[fault], headers={"Retry-After-Ms": RETRY_AFTER_MS})
        if fault == "reset":
            assert http.transport is not None
            http.transport.abort()
            return web.Response()
        answer = self._begin(messages, fault)
        if answer is None:
            return web.json_response({"error": {"message": "no beginning of this answer"}}, status=400)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        try:
            await response.prepare(http)
            await self._send(response, answer)
        except ConnectionError:
            pass
        return response

    def _next_fault(self) -> str:
        if time.monotonic() < self._refused_until:
            return self._refusal
        return self._faults.popleft() if self._faults else ""

    def _begin(self, messages: list[dict[str, Any]], fault: str) -> Answer | None:
        """The answer to these messages; None when what was said already is no beginning of it."""
        number, deltas, gap_ms, thoughts = map(int, messages[0]["content"].split(":"))
        said = messages[1]["content"] if len(messages) > 1 else ""
        tokens = re.findall(r"(\d+)\.\d+\.(\d+);", said)
        if [(str(number), str(index)) for index in range(len(tokens))] != tokens:
            return None
        self.begun[number] += 1
        self.whole[number] += not fault
        self.endless[number] += fault == "endless"
        return Answer(number, self.begun[number], len(tokens), deltas, gap_ms / 1000, thoughts, fault)

    async def _send(self, response: web.StreamResponse, answer: Answer) -> None:
        portion: list[bytes] = []
        for index in range(answer.start, ENDLESS if answer.fault == "endless" else answer.deltas):
            if index == answer.breaks_at and answer.fault != "endless":
                await response.write(b"".join(portion))
                await _fail(response, answer.fault)
                return
            portion.append(answer.delta(index))
            gap_s = answer.gap_s if index < answer.deltas else 0.0
            if gap_s or len(portion) == PORTION:
                await response.write(b"".join(portion))
                portion.clear()
            if gap_s:
                await asyncio.sleep(gap_s)
        await response.write(b"".join(portion) + answer.end())


async def _fail(response: web.StreamResponse, fault: str) -> None:
    match fault:
        case "cut":
            await response.write(frame({"content": "half a fra"})[:-30])
            transport = response._req.transport if response._req is not None else None  # noqa: SLF001  aiohttp hides it
            if transport is not None:
                transport.abort()
        case "error":
            await response.write(b'data: {"error":{"message":"asked to fail","code":"server_error"}}\n\n')
        case "stall":
            for _ in range(40):
                await response.write(b": keep-alive\n\n")
                await asyncio.sleep(0.2)
        case "eof":
            pass


def frame(delta: dict[str, Any], finish: str | None = None) -> bytes:
    """One event of a Chat Completions stream."""
    return b"data: " + orjson.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}) + b"\n\n"


class Door:
    """The port for model calls, which can be closed for a while. Faults are armed through another."""

    def __init__(self, upstream: Upstream, runner: web.AppRunner) -> None:
        self._upstream = upstream
        self._runner = runner
        self.port = 0

    async def open(self) -> None:
        """Listen, on the port of the last time if there was one."""
        listener = _bound(self.port)
        self.port = listener.getsockname()[1]
        self._site = web.SockSite(self._runner, listener)
        await self._site.start()

    async def close(self, http: web.Request) -> web.Response:
        """For how many seconds. Whoever uses a connection that was kept alive is reset, and tries a new one."""
        seconds = await http.json()
        self._upstream.refuse_for("reset", seconds)
        await self._site.stop()
        with _bound(self.port):  # it stays ours: a port that is bound and does not listen refuses
            await asyncio.sleep(seconds)
        await self.open()
        return web.Response()


def _bound(port: int) -> socket.socket:
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(("127.0.0.1", port))
    return made


async def main() -> None:
    """Serve until standard input ends."""
    upstream, app, orders = Upstream(), web.Application(), web.Application()
    runner, clerk = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1), web.AppRunner(orders)
    door = Door(upstream, runner)
    app.router.add_post("/v1/chat/completions", upstream.generate)
    orders.router.add_post("/faults", upstream.arm)
    orders.router.add_post("/refuse", upstream.refuse)
    orders.router.add_post("/close", door.close)
    orders.router.add_get("/calls", upstream.count)
    await runner.setup()
    await clerk.setup()
    await door.open()
    await web.TCPSite(clerk, "127.0.0.1", 0).start()
    ports = {"models": door.port, "orders": clerk.addresses[0][1]}
    print(json.dumps({name: f"http://127.0.0.1:{port}" for name, port in ports.items()}), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    uvloop.run(main())
