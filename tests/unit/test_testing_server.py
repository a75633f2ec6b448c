"""What the simulated model server writes, and when; what its answers mean is tests/contract/test_simulated_*."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import orjson
import pytest

from deltafan.testing import ScriptedUpstream, scripted_upstream
from deltafan.testing import chat as script
from support.waiting import wait_until

BODY = {"model": "sim", "messages": [{"role": "user", "content": "Hi"}], "stream": True}


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with scripted_upstream() as upstream:
        yield upstream


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def answer(http: aiohttp.ClientSession, url: str, **fields: Any) -> bytes:
    async with http.post(f"{url}/chat/completions", json={**BODY, **fields}) as response:
        return await response.read()


def contents(body: bytes) -> list[str]:
    chunks = [orjson.loads(line[6:]) for line in body.splitlines() if line.startswith(b"data: {")]
    return [choice["delta"]["content"] for c in chunks for choice in c["choices"] if choice["delta"].get("content")]


async def test_scripts_are_taken_in_order_and_then_the_standing_one(
    upstream: ScriptedUpstream, http: aiohttp.ClientSession
) -> None:
    upstream.then(script.text("one"), script.text("two"))
    answers = [contents(await answer(http, upstream.url)) for _ in range(3)]
    assert answers == [["one"], ["two"], ["Hello", ", ", "world", "!"]]


async def test_a_request_is_recorded_with_what_became_of_it(
    upstream: ScriptedUpstream, http: aiohttp.ClientSession
) -> None:
    async with http.post(f"{upstream.url}/chat/completions", json=BODY, headers={"Authorization": "Bearer k"}) as got:
        await got.read()
    (request,) = upstream.requests
    assert (request.body, request.headers["Authorization"]) == (BODY, "Bearer k")
    assert request.ended.is_set()
    assert not request.was_cut


async def test_an_event_holds_the_answer_and_a_client_that_leaves_is_noticed(
    upstream: ScriptedUpstream, http: aiohttp.ClientSession
) -> None:
    first = script.delta(content="first")
    upstream.then([first, asyncio.Event(), script.delta(content="never")])
    async with http.post(f"{upstream.url}/chat/completions", json=BODY) as response:
        assert await response.content.readany() == script.frame(first)
        assert not upstream.requests[0].ended.is_set()
        response.close()
    await asyncio.wait_for(upstream.requests[0].ended.wait(), 5)
    assert upstream.requests[0].was_cut


async def test_a_cut_breaks_the_answer_where_the_script_says(
    upstream: ScriptedUpstream, http: aiohttp.ClientSession
) -> None:
    half = script.Raw(script.frame(script.delta(content="torn"))[:50])
    upstream.then([half, script.Cut()])
    async with http.post(f"{upstream.url}/chat/completions", json=BODY) as response:
        received = bytearray()
        with pytest.raises(aiohttp.ClientPayloadError):
            async for piece in response.content.iter_any():
                received += piece
    assert bytes(received) == half.data
    assert not upstream.requests[0].was_cut, "it was the server who left"


async def test_byte_by_byte_arrives_in_as_many_pieces_and_at_once_in_one(upstream: ScriptedUpstream) -> None:
    frames = [script.delta(content="ab"), script.DONE]
    size = len(script.at_once(frames).data)
    upstream.then([script.at_once(frames)], [*script.byte_by_byte(frames)])
    whole, single = [await _pieces(upstream) for _ in range(2)]
    assert len([piece for piece in whole if b"data: " in piece]) == 1
    assert len(single) >= size
    # One piece in a chunked body: its length, the byte, and two line ends.
    assert max(len(piece) for piece in single[1:]) <= len(b"1\r\nx\r\n0\r\n\r\n")


async def _pieces(upstream: ScriptedUpstream) -> list[bytes]:
    """What each read of the socket gives."""
    host, port = upstream.url.removeprefix("http://").removesuffix("/v1").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = orjson.dumps(BODY)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: sim\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    pieces = []
    while piece := await reader.read(65_536):
        pieces.append(piece)
    writer.close()
    await writer.wait_closed()
    return pieces


async def test_a_models_name_may_ask_for_a_paced_answer(
    upstream: ScriptedUpstream, http: aiohttp.ClientSession
) -> None:
    loop = asyncio.get_running_loop()
    started = loop.time()
    assert contents(await answer(http, upstream.url, model="sim-5x20")) == ["0 ", "1 ", "2 ", "3 ", "4 "]
    assert loop.time() - started >= 5 * 0.02 - 1e-3


async def test_as_a_process_it_answers_tells_its_requests_and_ends_with_its_parent(
    http: aiohttp.ClientSession,
) -> None:
    command = [sys.executable, "-m", "deltafan.testing", "--port", "0"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:  # type: ignore[call-overload]
        url = json.loads(await asyncio.to_thread(process.stdout.readline))["url"]
        assert len(contents(await answer(http, url, model="sim-3x0"))) == 3

        async def requests() -> list[dict[str, Any]]:
            async with http.get(url.removesuffix("/v1") + "/_requests") as response:
                return list(await response.json())

        async with http.post(f"{url}/chat/completions", json={**BODY, "model": "sim-1x60000"}) as response:
            await response.content.readany()
            assert [(r["body"]["model"], r["ended"]) for r in await requests()] == [
                ("sim-3x0", True),
                ("sim-1x60000", False),
            ]
            response.close()

        async def is_noticed() -> bool:
            return bool((await requests())[1]["was_cut"])

        await wait_until(is_noticed, "the second client's leaving is noticed")
        process.stdin.close()
        assert await asyncio.to_thread(process.wait, 10) == 0
