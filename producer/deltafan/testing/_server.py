"""The simulated model server: three APIs on one loopback port, over real HTTP."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import orjson
from aiohttp import web

from deltafan.testing import chat, dashscope, responses
from deltafan.testing._answer import Answer
from deltafan.testing._steps import Cut, Dialect, Frame, Gap, Refuse, Step, pause
from deltafan.testing._stored import StoredResponse
from deltafan.testing._upstream import Request, ScriptedUpstream

COMPATIBLE = "/compatible-mode/v1"
NATIVE = "/api/v1"
THINKING_IS_INCREMENTAL = 'The incremental_output parameter must be "true" when enable_thinking is true'


class Server:
    """Answers what arrives with the upstream's scripts."""

    def __init__(self, upstream: ScriptedUpstream) -> None:
        self._upstream = upstream
        self._stored: dict[str, StoredResponse] = {}
        self._numbers = count(1)

    def app(self) -> web.Application:
        """The routes of all three APIs."""
        app = web.Application(client_max_size=2**30)
        for base in ("/v1", COMPATIBLE):
            app.router.add_post(f"{base}/chat/completions", self.create_chat)
            app.router.add_post(f"{base}/responses", self.create_response)
            app.router.add_get(f"{base}/responses/{{id}}", self.retrieve_response)
            app.router.add_post(f"{base}/responses/{{id}}/cancel", self.cancel_response)
        for route in ("text", "multimodal"):
            app.router.add_post(f"{NATIVE}/services/aigc/{route}-generation/generation", self.generate)
        app.router.add_get("/_requests", self.list_requests)
        return app

    async def stop(self) -> None:
        """End what runs in the background."""
        for stored in self._stored.values():
            await stored.stop()

    async def list_requests(self, _http: web.Request) -> web.Response:
        """What `requests` holds, for another process."""
        return web.json_response([request.as_json() for request in self._upstream.requests])

    async def create_chat(self, http: web.Request) -> web.StreamResponse:
        """Chat Completions."""
        async with self._noted(http) as request:
            script = self._upstream.script_for(request)
            if isinstance(script, Refuse):
                return _refused(script)
            dialect, body = _dialect(http), request.body
            if not isinstance(script, Answer):
                return await _stream(http, script, chat.frame)
            if body.get("stream") is not True:
                return await _whole(script, chat.refusal, lambda: chat.whole(script, dialect))
            options = body.get("stream_options") or {}
            steps = chat.render(
                script,
                dialect=dialect,
                include_usage=options.get("include_usage") is True,
                include_obfuscation=options.get("include_obfuscation") is not False,
                model=str(body.get("model")),
            )
            return await _stream(http, steps, chat.frame)

    async def create_response(self, http: web.Request) -> web.StreamResponse:
        """Responses, also in background mode."""
        async with self._noted(http) as request:
            script = self._upstream.script_for(request)
            if isinstance(script, Refuse):
                return _refused(script)
            dialect, body = _dialect(http), request.body
            streamed = body.get("stream") is True
            # DashScope ignores the wish.
            background = body.get("background") is True and dialect == "openai"
            framing = responses.Framing(f"resp_{next(self._numbers)}", str(body.get("model")), dialect)
            stored = StoredResponse(framing, background=background, streamed=streamed)
            if background or body.get("store") is not False:
                self._stored[framing.response["id"]] = stored
            steps = _response_steps(script, body, dialect, background=background)
            if background:
                stored.start(steps)
                return await _follow(http, stored) if streamed else _json(stored.object)
            if streamed:
                return await _stream(http, steps, framing)
            await _play_unseen(steps, framing)
            return _json(stored.object)

    async def retrieve_response(self, http: web.Request) -> web.StreamResponse:
        """A stored response, as an object or, from background mode, as a stream."""
        async with self._noted(http) as request:
            if (refusal := self._upstream.refusal_to_retrieve()) is not None:
                return _refused(refusal)
            stored = self._stored.get(http.match_info["id"])
            streamed = request.query.get("stream") == "true"
            if stored is None or (streamed and not stored.replays):
                return _not_found(http)
            if streamed:
                return await _follow(http, stored, int(request.query.get("starting_after", -1)))
            return _json(stored.object)

    async def cancel_response(self, http: web.Request) -> web.StreamResponse:
        """End a background response."""
        async with self._noted(http):
            stored = self._stored.get(http.match_info["id"])
            if stored is None or _dialect(http) == "dashscope":
                return _not_found(http)
            if not stored.background:
                message = "Cannot cancel a synchronous response."
                return _refused(responses.refusal("invalid_request_error", message, 400))
            await stored.stop("cancelled")
            return _json(stored.object)

    async def generate(self, http: web.Request) -> web.StreamResponse:
        """DashScope's native API, either path."""
        async with self._noted(http) as request:
            route: dashscope.Route = "multimodal" if "/multimodal-generation/" in http.path else "text"
            streamed = request.headers.get("X-DashScope-SSE") == "enable"
            if dashscope.lives_on(str(request.body.get("model"))) not in (None, route):
                if streamed and self._upstream.wrong_path_status == 200:
                    error = dashscope.error("InvalidParameter", dashscope.WRONG_PATH)
                    return await _stream(http, [error], dashscope.Framing())
                return _refused(dashscope.refusal("InvalidParameter", dashscope.WRONG_PATH, 400))
            parameters = request.body.get("parameters") or {}
            thinks = parameters.get("enable_thinking") is True
            if thinks and parameters.get("incremental_output") is False:
                return _refused(dashscope.refusal("InvalidParameter", THINKING_IS_INCREMENTAL, 400))
            script = self._upstream.script_for(request)
            if isinstance(script, Refuse):
                return _refused(script)
            if not isinstance(script, Answer):
                return await _stream(http, script, dashscope.Framing())
            as_message = parameters.get("result_format") == "message"
            if not streamed:
                answered = lambda: dashscope.whole(script, route=route, as_message=as_message)  # noqa: E731
                return await _whole(script, dashscope.refusal, answered)
            incremental = thinks or parameters.get("incremental_output") is True
            steps = dashscope.render(script, route=route, incremental=incremental, as_message=as_message)
            return await _stream(http, steps, dashscope.Framing())

    @asynccontextmanager
    async def _noted(self, http: web.Request) -> AsyncIterator[Request]:
        """Record the request, and what becomes of it."""
        data = await http.read()
        body = orjson.loads(data) if data else {}
        request = Request(body, dict(http.headers), http.path, http.method, dict(http.query))
        self._upstream.requests.append(request)
        self._upstream.arrived.set()
        try:
            yield request
        except (ConnectionError, asyncio.CancelledError):
            request.was_cut = True
            raise
        finally:
            request.ended.set()


def _dialect(http: web.Request) -> Dialect:
    return "dashscope" if http.path.startswith(COMPATIBLE) else "openai"


def _response_steps(
    script: Answer | Iterable[Step], body: dict[str, Any], dialect: Dialect, *, background: bool
) -> list[Step]:
    if not isinstance(script, Answer):
        return [*script]
    return responses.render(
        script,
        dialect=dialect,
        background=background,
        summary=bool((body.get("reasoning") or {}).get("summary")),
        include_obfuscation=(body.get("stream_options") or {}).get("include_obfuscation") is not False,
    )


async def _stream(http: web.Request, steps: Iterable[Step], frame: Callable[[Frame], bytes]) -> web.StreamResponse:
    response = await _open(http)
    for step in steps:
        if isinstance(step, Gap | asyncio.Event):
            await pause(step)
        elif isinstance(step, Cut):
            return _cut(http, response)
        else:
            await response.write(frame(step))
    return response


async def _follow(http: web.Request, stored: StoredResponse, after: int = -1) -> web.StreamResponse:
    """Write what is stored beyond this number, and what is added, until nothing more will be."""
    response = await _open(http)
    position = 0
    while entries := await stored.beyond(position):
        position += len(entries)
        for entry in entries:
            if entry.data is not None:
                if entry.number > after:
                    await response.write(entry.data)
            elif not entry.taken:
                entry.taken = True
                return _cut(http, response)
    return response


async def _whole(
    answer: Answer, refusal: Callable[[str, str, int], Refuse], answered: Callable[[], dict[str, Any]]
) -> web.Response:
    """An answer in one piece, after the time that it takes."""
    for step in answer.parts:
        if isinstance(step, Gap | asyncio.Event):
            await pause(step)
    if (fault := answer.fault) is not None:
        return _refused(refusal(fault.code, fault.message, fault.status))
    return _json(answered())


async def _play_unseen(steps: Iterable[Step], framing: responses.Framing) -> None:
    for step in steps:
        if isinstance(step, Gap | asyncio.Event):
            await pause(step)
        elif not isinstance(step, Cut):
            framing(step)


async def _open(http: web.Request) -> web.StreamResponse:
    # DashScope says so on all its paths.
    charset = "" if http.path.startswith("/v1/") else ";charset=UTF-8"
    response = web.StreamResponse(headers={"Content-Type": f"text/event-stream{charset}"})
    await response.prepare(http)
    return response


def _cut(http: web.Request, response: web.StreamResponse) -> web.StreamResponse:
    if http.transport is not None:
        http.transport.abort()
    return response


def _refused(refusal: Refuse) -> web.Response:
    return web.Response(status=refusal.status, body=refusal.body, headers=dict(refusal.headers))


def _not_found(http: web.Request) -> web.Response:
    if _dialect(http) == "dashscope":
        return _refused(responses.refusal("Not Found", "Not support", 404, "dashscope"))
    message = f"Response with id '{http.match_info['id']}' not found."
    return _refused(responses.refusal("invalid_request_error", message, 404))


def _json(value: object) -> web.Response:
    return web.Response(body=orjson.dumps(value), content_type="application/json")


@asynccontextmanager
async def scripted_upstream(port: int = 0) -> AsyncIterator[ScriptedUpstream]:
    """An upstream on loopback, in this event loop. GET /_requests tells another process what `requests` tells this."""
    upstream = ScriptedUpstream()
    server = Server(upstream)
    # handler_cancellation: a request's handler ends when its client goes away, which is what tests look for.
    runner = web.AppRunner(server.app(), handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    host, bound_port = runner.addresses[0][:2]
    origin = f"http://{host}:{bound_port}"
    upstream.url = f"{origin}/v1"
    upstream.compatible_url = f"{origin}{COMPATIBLE}"
    upstream.dashscope_url = f"{origin}{NATIVE}"
    try:
        yield upstream
    finally:
        await server.stop()
        await runner.cleanup()
