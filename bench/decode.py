"""Decoding: frames per second of each decoder, and its API's stream read to the end beside the vendor's own SDK."""

import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import dashscope
from openai import AsyncOpenAI

from deltafan._events import Delta
from deltafan_worker._apis import APIS, generating
from deltafan_worker._route import Route
from deltafan_worker._upstream import stream_generation
from measure import Bench, Report
from upstream import frames

HI: Any = [{"role": "user", "content": "Hi"}]
DELTAS = 5000
MODEL = f"bench-{DELTAS}-1-20"
BODIES: dict[str, Any] = {
    "chat": {"messages": HI},
    "responses": {"input": "Hi"},
    "dashscope": {"input": {"messages": HI}},
}
ROUNDS = 3


async def run(bench: Bench, report: Report) -> None:
    """Measure every API; each figure is the least of some rounds."""
    dashscope.base_http_api_url = bench.upstream_url
    for api in APIS:
        alone, bursts = (min(_decode(api, size) for _ in range(ROUNDS)) for size in (1, 20))
        report.note(f"{api} decoder: {1 / alone:,.0f} frames/s one by one, {1 / bursts:,.0f} in packets of 20")
        ours = min([await _cpu(_ours, bench, api) for _ in range(ROUNDS)])
        theirs = min([await _cpu(_SDKS[api], bench, api) for _ in range(ROUNDS)])
        figure = f"{ours * 1e6:.1f} us per delta against {theirs * 1e6:.1f} us, {theirs / ours:.1f} times less"
        report.add(f"{api}, read over HTTP beside the vendor's SDK", figure, "less than the SDK", ours < theirs)


def _decode(api: str, size: int) -> float:
    """Seconds of CPU per frame, without any transport."""
    path = {"responses": "/responses", "dashscope": "/generation"}.get(api, "/chat")
    deltas, end = frames(path, DELTAS)
    packets = [b"".join(deltas[start : start + size]) for start in range(0, len(deltas), size)]
    decoder, seen, started = APIS[api].decoder("bench"), 0, time.process_time()
    for packet in (*packets, end):
        decoder.feed(packet)
        while decoder.next_delta() is not None:
            seen += 1
    assert (seen, decoder.completion().finish_reason) == (DELTAS, "stop")
    return (time.process_time() - started) / DELTAS


async def _cpu(read: Callable[[Bench, str], Awaitable[int]], bench: Bench, api: str) -> float:
    """Seconds of this process's CPU per delta; the server is another process."""
    started = time.process_time()
    deltas = await read(bench, api)
    assert deltas == DELTAS, f"{deltas} deltas of {api}"
    return (time.process_time() - started) / DELTAS


async def _ours(bench: Bench, api: str) -> int:
    url = bench.upstream_url + APIS[api].paths("bench")[0]
    route, seen = Route(provider="b", api=api, model=MODEL, url=url), 0

    def publish(deltas: list[Delta]) -> None:
        nonlocal seen
        seen += len(deltas)

    async with aiohttp.ClientSession() as session:
        await stream_generation(session, route, generating(route, BODIES[api]), APIS[api].decoder("bench"), publish)
    return seen


async def _openai_chat(bench: Bench, _api: str) -> int:
    async with AsyncOpenAI(api_key="none", base_url=bench.upstream_url) as client:
        stream: Any = await client.chat.completions.create(model=MODEL, messages=HI, stream=True)
        return sum([bool(chunk.choices and chunk.choices[0].delta.content) async for chunk in stream])


async def _openai_responses(bench: Bench, _api: str) -> int:
    async with AsyncOpenAI(api_key="none", base_url=bench.upstream_url) as client:
        stream = await client.responses.create(model=MODEL, input="Hi", stream=True)
        return sum([event.type == "response.output_text.delta" async for event in stream])


async def _dashscope(_bench: Bench, _api: str) -> int:
    # Its streaming call blocks; nothing else runs in this loop.
    answers: Any = dashscope.Generation.call(
        model=MODEL, messages=HI, api_key="none", stream=True, incremental_output=True, result_format="message"
    )
    return sum(bool(answer.output.choices[0].message.content) for answer in answers)


_SDKS = {"chat": _openai_chat, "responses": _openai_responses, "dashscope": _dashscope}
