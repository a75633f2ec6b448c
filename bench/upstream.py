"""A fast model server for benchmarks: `python bench/upstream.py`, one process, no framework.

The answer's shape comes from the model's name, `bench-<deltas>-<gap_ms>-<burst>`: so many deltas, `burst` of them in
each write, so many ms between writes. Prints its URL as JSON, ends when standard input does. GET /stats tells when
requests came, and when clients went away in mid-answer. A name that begins with `stamped-` puts the time of sending
into each delta.
"""

import asyncio
import json
import sys
import time
from functools import cache
from typing import Any, cast

import uvloop

HEAD = {"id": "chatcmpl-BcD1fGh2JkL3mNo4PqR5sTu6", "object": "chat.completion.chunk", "created": 1764661832}
REST = {"model": "bench-1", "service_tier": "default", "system_fingerprint": "fp_0123456789"}
RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def frame(choices: list[Any], usage: Any = None) -> bytes:
    """One event as OpenAI's API sends it."""
    return (
        b"data: "
        + json.dumps({**HEAD, **REST, "choices": choices, "usage": usage}, separators=(",", ":")).encode()
        + b"\n\n"
    )


def http_chunk(data: bytes) -> bytes:
    """A piece of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def typed(kind: str, number: int, **fields: Any) -> bytes:
    """One event as OpenAI's Responses API sends it."""
    data = json.dumps({"type": kind, "sequence_number": number, **fields}, separators=(",", ":"))
    return f"event: {kind}\ndata: {data}\n\n".encode()


def native(text: str, number: int, finish: str = "null") -> bytes:
    """One frame as DashScope's native API sends it."""
    choice = {"message": {"content": text, "role": "assistant"}, "finish_reason": finish}
    usage = {"total_tokens": 10 + number, "output_tokens": number, "input_tokens": 10}
    request_id = "d272255f-82d7-9cc7-93c5-17ff77024349"
    data = json.dumps(
        {"output": {"choices": [choice]}, "usage": usage, "request_id": request_id}, separators=(",", ":")
    )
    return f"id:{number}\nevent:result\n:HTTP_STATUS/200\ndata:{data}\n\n".encode()


CONTENT = " token"
DELTA = frame([{"index": 0, "delta": {"content": CONTENT}, "logprobs": None, "finish_reason": None}])
END = (
    frame([{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}])
    + frame([], {"prompt_tokens": 10, "completion_tokens": 100, "total_tokens": 110})
    + b"data: [DONE]\n\n"
)
ITEM = "msg_0da4c3f1f2e8a9000169953"
PLACE = {"item_id": ITEM, "output_index": 0, "content_index": 0}


def frames(path: str, count: int) -> tuple[list[bytes], bytes]:
    """The deltas of an answer, and its end, as the API of this path streams them."""
    if path.endswith("/responses"):
        deltas = [
            typed("response.output_text.delta", n, delta=CONTENT, logprobs=[], **PLACE, obfuscation="qfQVOwfh62oUst")
            for n in range(count)
        ]
        usage: dict[str, Any] = {"input_tokens": 10, "output_tokens": 100, "total_tokens": 110}
        usage |= {"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
        part = {"type": "output_text", "text": CONTENT * count, "annotations": []}
        item = {"type": "message", "id": ITEM, "role": "assistant", "status": "completed", "content": [part]}
        response = {"id": "resp_1", "object": "response", "created_at": 1, "model": "bench", "status": "completed"}
        return deltas, typed("response.completed", count, response={**response, "output": [item], "usage": usage})
    if path.endswith("/generation"):
        return [native(CONTENT, n + 1) for n in range(count)], native("", count + 1, "stop")
    return [DELTA] * count, END


@cache
def shape(path: str, model: str) -> tuple[list[bytes], float]:
    """The writes of an answer and the seconds between them."""
    deltas, gap_ms, burst = model.rsplit("bench-", 1)[1].split("-")
    pieces, end = frames(path, int(deltas))
    size = int(burst)
    writes = [http_chunk(b"".join(pieces[sent : sent + size])) for sent in range(0, len(pieces), size)]
    return [*writes, http_chunk(end) + b"0\r\n\r\n"], float(gap_ms) / 1000


@cache
def whole(model: str) -> tuple[bytes, float]:
    """The response to who does not want a stream, and the seconds until the stream would have ended."""
    writes, gap_s = shape("/chat/completions", model)
    text = CONTENT * int(model.rsplit("bench-", 1)[1].split("-", maxsplit=1)[0])
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 10, "completion_tokens": 100, "total_tokens": 110}
    body = json.dumps({**HEAD, "object": "chat.completion", **REST, "choices": [choice], "usage": usage}).encode()
    return http_json(body), gap_s * (len(writes) - 1)


def http_json(body: bytes) -> bytes:
    """A response in one piece."""
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


class Server(asyncio.Protocol):
    """One connection; requests on it come one after another."""

    def __init__(self, arrivals: list[float], departures: list[float]) -> None:
        self._arrivals = arrivals
        self._departures = departures
        self._is_answering = False
        self._received = b""
        self._timer: asyncio.TimerHandle | None = None
        self._stamped = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, _exc: Exception | None) -> None:
        """Called by the event loop."""
        if self._timer is not None:
            self._timer.cancel()
        if self._is_answering:
            self._departures.append(time.time())

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end:
            return
        length = next(
            (int(h.split(b":")[1]) for h in head.split(b"\r\n") if h.lower().startswith(b"content-length:")), 0
        )
        if len(body) < length:
            return
        self._received = body[length:]
        if head.startswith(b"GET"):
            self._answer_stats()
            return
        self._arrivals.append(time.time())
        self._answer(head.split(b" ", 2)[1].decode(), json.loads(body[:length]))

    def _answer(self, path: str, request: dict[str, Any]) -> None:
        model = request["model"]
        if path.endswith("/chat/completions") and not request.get("stream"):
            response, delay_s = whole(model)
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._transport.write, response)
            return
        writes, gap_s = shape(path, model)
        self._transport.write(RESPONSE)
        self._stamped = model.startswith("stamped-")
        if gap_s == 0:
            self._transport.write(b"".join(writes))
        else:
            self._step(writes, 0, gap_s, asyncio.get_running_loop().time())

    def _step(self, writes: list[bytes], index: int, gap_s: float, due: float) -> None:
        data = writes[index]
        if self._stamped and index + 1 < len(writes):
            data = http_chunk(DELTA.replace(CONTENT.encode(), b"%.6f" % time.time()))
        self._transport.write(data)
        self._is_answering = index + 1 < len(writes)
        if index + 1 < len(writes):
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(due + gap_s, self._step, writes, index + 1, gap_s, due + gap_s)

    def _answer_stats(self) -> None:
        body = json.dumps({"arrivals": self._arrivals, "departures": self._departures}).encode()
        self._arrivals.clear()
        self._departures.clear()
        self._transport.write(http_json(body))


async def main() -> None:
    """Serve until standard input ends."""
    arrivals: list[float] = []
    departures: list[float] = []
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Server(arrivals, departures), "127.0.0.1", 0, backlog=4096)
    port = server.sockets[0].getsockname()[1]
    print(json.dumps({"url": f"http://127.0.0.1:{port}/v1"}), flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    uvloop.run(main())
