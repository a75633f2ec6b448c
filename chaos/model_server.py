"""The model server of the chaos runs, a process of its own: `python chaos/model_server.py` prints its URL as JSON.

The prompt says what to answer, `<number>:<deltas>:<gap_ms>`, and each delta tells whose it is:
`<number>.<call>.<index>;`, where `call` counts the requests for that number. So the truth is known for every
transcript, and one that mixes two calls can be seen. The first fifth of the deltas is reasoning.
POST /faults arms faults for the next requests, GET /calls tells how often each number was asked for.
"""

import asyncio
import json
import sys
from collections import Counter, deque
from typing import Any

import orjson
import uvloop
from aiohttp import web

REFUSALS = {"limit": 429, "down": 503, "broken": 500}


class Upstream:
    """Answers, counts, and fails when told to."""

    def __init__(self) -> None:
        self.calls: Counter[int] = Counter()
        self.faults: deque[str] = deque()

    async def arm(self, http: web.Request) -> web.Response:
        """The names of the faults of the next requests, one each."""
        self.faults.extend(await http.json())
        return web.Response()

    async def count(self, _http: web.Request) -> web.Response:
        """Calls that were answered, by number."""
        return web.json_response(self.calls)

    async def generate(self, http: web.Request) -> web.StreamResponse:
        """One model call."""
        prompt = orjson.loads(await http.read())["messages"][0]["content"]
        number, deltas, gap_ms = map(int, prompt.split(":"))
        fault = self.faults.popleft() if self.faults else ""
        if fault in REFUSALS:
            error = {"error": {"message": "asked to fail", "code": fault}}
            return web.json_response(error, status=REFUSALS[fault], headers={"Retry-After-Ms": "50"})
        if fault == "refuse":
            assert http.transport is not None
            http.transport.abort()
            return web.Response()
        self.calls[number] += 1
        call = self.calls[number]
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        try:
            await response.prepare(http)
            await self._answer(response, number, call, deltas, gap_ms / 1000, fault)
        except ConnectionError:
            pass
        return response

    async def _answer(
        self, response: web.StreamResponse, number: int, call: int, deltas: int, gap_s: float, fault: str
    ) -> None:
        fault_at = deltas // 2 if fault else -1
        index = 0
        while index < deltas or fault == "endless":
            if index == fault_at and await self._fail(response, fault):
                return
            kind = "reasoning_content" if index < deltas // 5 else "content"
            await response.write(frame({kind: f"{number}.{call}.{index};"}))
            index += 1
            if gap_s:
                await asyncio.sleep(gap_s)
        usage = {"prompt_tokens": 5, "completion_tokens": deltas, "total_tokens": 5 + deltas}
        await response.write(frame({}, "stop") + b"data: " + orjson.dumps({"choices": [], "usage": usage}) + b"\n\n")
        await response.write(b"data: [DONE]\n\n")

    async def _fail(self, response: web.StreamResponse, fault: str) -> bool:
        """Do it; whether the answer is over with that."""
        transport = response._req.transport if response._req is not None else None  # noqa: SLF001  aiohttp hides it
        match fault:
            case "cut":
                await response.write(frame({"content": "half a fra"})[:-30])
                if transport is not None:
                    transport.abort()
            case "error":
                await response.write(b'data: {"error":{"message":"asked to fail","code":"server_error"}}\n\n')
            case "eof":
                pass
            case "stall":
                for _ in range(40):
                    await response.write(b": keep-alive\n\n")
                    await asyncio.sleep(0.2)
            case _:
                return False
        return True


def frame(delta: dict[str, Any], finish: str | None = None) -> bytes:
    """One event of a Chat Completions stream."""
    return b"data: " + orjson.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}) + b"\n\n"


async def main() -> None:
    """Serve until standard input ends."""
    upstream = Upstream()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", upstream.generate)
    app.router.add_post("/faults", upstream.arm)
    app.router.add_get("/calls", upstream.count)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(json.dumps({"url": f"http://127.0.0.1:{runner.addresses[0][1]}"}), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    uvloop.run(main())
