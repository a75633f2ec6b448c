"""Fuzzes the decoders: `python tests/fuzz/decoders.py --cases 1000000 [--seed N] [--api chat]`.

Takes recorded shapes of each API apart and puts them together wrong: bytes flipped, cut and repeated, frames dropped
and mixed, JSON values replaced by others or spread over two frames, the stream cut anywhere. Whatever comes, a decoder
may raise UpstreamError and nothing else, gives valid UTF-8 that can be folded, and comes to the same end however the
bytes are cut, and whether it parses each event or not; and of all that it gives the job's last records can be written.
Then one line of 64 MiB: time and memory must grow in step with it.
"""

import json
import random
import resource
import sys
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from os import cpu_count
from pathlib import Path
from typing import Any, Literal, cast

sys.path.insert(0, str(Path(__file__).parents[1]))

from deltafan._events import Delta
from deltafan._position import Position
from deltafan.testing import (
    Answer,
    Audio,
    Fault,
    Frame,
    Reasoning,
    Text,
    Tokens,
    ToolCall,
    chat,
    dashscope,
    responses,
)
from deltafan_worker._apis import APIS
from deltafan_worker._ending import CallMeter, Ending, seal
from deltafan_worker._log import AttemptLog
from deltafan_worker._route import Route
from support.decoding import Outcome

ANSWERS = (
    Answer([Text("Hello"), Text(", "), Text("wörld 🌍")]),
    Answer([Reasoning("Hm."), Text("Yes.")], usage=Tokens(9, 7, cached_input=4, reasoning=3)),
    Answer(
        [Reasoning("So."), ToolCall("call_1", "f", ['{"a":', "1}"]), ToolCall("call_2", "g", ["{}"])],
        finish="tool_calls",
    ),
    Answer([Text("Hi"), Audio(bytes(range(40)), "Hi"), Audio(bytes(7))]),
    Answer(
        [*map(Reasoning, ("Let", " me", " see", "\n", '"')), *map(Text, ("1", "10", "\\", "\u2028", "世", " a", "."))]
    ),
    Answer([Text("Once"), Fault("Throttling.RateQuota", "slow down 🌍", status=429)]),
)
SOURCE = {"type": "url_citation", "url": "http://a", "title": "世"}
MODELS = ("qwen", "kimi-k2")
LINE_COPIES = 8
"""How often a decoder may hold an overlong line, in bytes, text and JSON."""
LINEAR = 10
"""How much longer four times the bytes may take; 16 would be quadratic."""
ODD: tuple[Any, ...] = (None, True, 0, -1, 1.5, "", "null", "stop", "error", [], {}, [[]], {"": None})
ODD += (
    "\ud83d",
    10**30,
    float("nan"),
    "A=",
    "no base64",
    r'[{"text": "a\q',
    {"\ud83d": ["\ud83d"]},
    [{"a": {"b": 10**30}}],
)
ODD += (json.loads('[{"a":' * 150 + "0" + "}]" * 150),)
NOISE: tuple[bytes, ...] = (b"\n", b"\r", b"\r\n\r\n", b"data:", b"data: [DONE]\n\n", b"event: error\n", b"\xff\xfe")
NOISE += (b"\x00", b":HTTP_STATUS/500\n", b"id:1\n", b"retry: 1\n", b"data: {\n\n", b'data: "text"\n\n')
NOISE += (b"data: []\n\n", b"\xef\xbb\xbf", b'{"error":{}}')
DIALECTS: tuple[Literal["openai", "dashscope"], ...] = ("openai", "dashscope")


def corpus(api: str) -> list[list[bytes]]:
    """Whole answers of an API, as frames."""
    frames: list[list[Any]] = []
    for answer in ANSWERS:
        if api == "chat":
            frames.append([chat.frame(cast(Frame, step)) for step in chat.render(answer)])
        elif api == "responses":
            for dialect in DIALECTS:
                steps = responses.render(answer, dialect=dialect)
                frames.append([responses.frame(cast(Frame, step)) for step in steps])
        else:
            for incremental in (True, False):
                steps = dashscope.render(answer, incremental=incremental)
                frames.append([dashscope.frame(cast(Frame, step)) for step in steps])
    return [*frames, list(_strange(api))]


def _strange(api: str) -> Iterator[bytes]:
    """What no answer of the simulators has: sources, and kimi's JSON inside a string, sent anew with each frame."""
    if api == "chat":
        yield from (chat.frame(chat.delta(annotations=[SOURCE])), *map(chat.frame, chat.text("x")))
    elif api == "responses":
        added = responses.event("response.output_text.annotation.added", annotation=SOURCE)
        yield from (responses.frame(added), responses.frame(responses.completed()))
    else:
        found = {"search_info": {"search_results": [SOURCE]}, "finish_reason": "null"}
        yield dashscope.frame(dashscope.result(found, dashscope.USAGE))
        for text in ('[{"text": "Okay', '[{"text": "Okay, \\u4e16\\n', '[{"text": "Okay, \\u4e16\\n."}]'):
            yield dashscope.frame(dashscope.delta(text))
        yield dashscope.frame(dashscope.delta(finish="stop"))


def mutated(whole: list[bytes], chance: random.Random) -> bytes:
    """One answer, damaged in a few ways."""
    frames = list(whole)
    for _ in range(chance.randrange(4)):
        at = chance.randrange(len(frames))
        match chance.randrange(7):
            case 0:
                frames[at] = _json_replaced(frames[at], chance)
            case 1:
                frames[at] = frames[chance.randrange(len(frames))]
            case 2:
                frames.insert(at, chance.choice(NOISE))
            case 3:
                frames[at] = _bytes_changed(frames[at], chance)
            case 4:
                frames[at] = frames[at].replace(b"\n", chance.choice((b"\r\n", b"\r", b"\n\n")))
            case 5:
                frames[at : at + 1] = _text_spread(frames[at], chance)
            case _:
                del frames[at:][:1]
    stream = b"".join(frames)
    return stream[: chance.randrange(len(stream) + 1)] if chance.random() < 0.2 else stream


def _events(stream: bytes) -> list[bytes]:
    """The stream as most servers send it, an event to a packet."""
    *events, rest = stream.split(b"\n\n")
    return [*(event + b"\n\n" for event in events), rest]


def _json_replaced(frame: bytes, chance: random.Random) -> bytes:
    """The frame with one value of its object replaced."""
    head, value = _parsed(frame)
    if places := list(_places(value)):
        holder, key = chance.choice(places)
        holder[key] = chance.choice(ODD)
    return head + json.dumps(value).encode() + b"\n\n"


def _text_spread(frame: bytes, chance: random.Random) -> list[bytes]:
    """Two frames instead of one: each has a part of one of its texts, in base64 and escaped text also at odd places."""
    head, value = _parsed(frame)
    texts = [(holder, key) for holder, key in _places(value) if isinstance(holder[key], str) and holder[key]]
    if not texts:
        return [frame]
    holder, key = chance.choice(texts)
    text = holder[key]
    cut = chance.choice((len(text) - 1, chance.randrange(len(text))))
    spread = []
    for holder[key] in (text[:cut], text[cut:]):
        spread.append(head + json.dumps(value).encode() + b"\n\n")
    return spread


def _parsed(frame: bytes) -> tuple[bytes, Any]:
    """What stands before a frame's object, and the object; an empty one for what has none."""
    head, mark, data = frame.partition(b"data:")
    try:
        return head + mark, json.loads(data)
    except ValueError:
        return head + mark, {}


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _places(inner)


def _bytes_changed(frame: bytes, chance: random.Random) -> bytes:
    data = bytearray(frame)
    for _ in range(chance.randint(1, 4)):
        data[chance.randrange(len(data))] = chance.randrange(256)
    return bytes(data)


def fuzz(api: str, cases: int, seed: int) -> int:
    """Try so many cases. Raises what no decoder may raise, with the case in its message."""
    chance, answers = random.Random(f"{api}/{seed}"), corpus(api)
    for case in range(cases):
        stream, model = mutated(chance.choice(answers), chance), chance.choice(MODELS)
        cuts = sorted(chance.randrange(len(stream) + 1) for _ in range(chance.randrange(4)))
        pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
        try:
            whole = Outcome(APIS[api].decoder(model), stream, parses_all=True)
            cut, events = (Outcome(APIS[api].decoder(model), *packets) for packets in (pieces, _events(stream)))
            assert cut == whole, "the outcome depends on how the bytes are cut"
            assert events == whole, "the outcome depends on what is parsed"
            assert all(data.decode() for _, data in whole.deltas), "an empty delta"
            assert whole.generation is not None
            _seal(api, whole)
        except Exception as error:
            raise AssertionError(f"{api}, seed {seed}, case {case}: {error!r} from {stream!r} cut at {cuts}") from error
    return cases


def _seal(api: str, outcome: Outcome) -> None:
    """Write the last records of a job, as its run would."""
    log = AttemptLog()
    for kind, data in outcome.deltas:
        log.extend([Delta(kind, data)])
    route = Route(provider="p", api=api, model="m", url="")
    meter = CallMeter(job_id="j", call_id="c", lane="batch", tenant=None, worker="w", submitted_at_ms=None, route=route)
    meter.note(outcome.decoder)
    ending = Ending.completed(outcome.finish or "")
    if outcome.error is not None:
        ending = Ending.failed(outcome.error.code, outcome.error.message)
    usage = meter.record("completed", attempt=1, attempt_no=1, output_bytes=log.size_bytes)
    seal(ending, log, replace(usage, finish_reason=outcome.finish), Position(1, 1))


def long_line(api: str, mebibytes: int) -> tuple[float, float]:
    """Seconds of CPU and bytes of resident memory for one answer in a single line, fed as a network would.

    To be run in a process of its own, since a process's highest mark of memory never falls.
    """
    text = "@"
    body = {
        "chat": {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": "stop"}]},
        "responses": {"type": "response.output_text.delta", "output_index": 0, "delta": text},
        "dashscope": {"output": {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}},
    }[api]
    head, tail = json.dumps(body).encode().split(b"@")
    stream = memoryview(b"".join((b"data: ", head, b"x" * (mebibytes * 2**20), tail, b"\n\n")))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, decoder, size = time.process_time(), APIS[api].decoder("qwen"), 0
    for at in range(0, len(stream), 65_536):
        decoder.feed(bytes(stream[at : at + 65_536]))
        while (delta := decoder.next_delta()) is not None:
            size += len(delta.data)
    assert size == mebibytes * 2**20
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return time.process_time() - started, grown * 1024


def main() -> int:
    """Fuzz on all processors; 1 when something was found."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1_000_000, help="for each decoder")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    parser.add_argument("--api", choices=APIS, action="append")
    args = parser.parse_args()
    share = 2_000
    for api in args.api or APIS:
        started = time.monotonic()
        with ProcessPoolExecutor(cpu_count()) as pool:
            runs = range(-(-args.cases // share))
            seeds = [args.seed + run for run in runs]
            cases = sum(pool.map(fuzz, [api] * len(runs), [share] * len(runs), seeds))
        with ProcessPoolExecutor(1, max_tasks_per_child=1, mp_context=get_context("spawn")) as one:
            short, long = one.map(long_line, [api] * 2, (15, 60))
        growth = f"time x{long[0] / short[0]:.1f}, memory x{long[1] / short[1]:.1f} ({long[1] / 2**20:.0f} MiB at most)"
        took = time.monotonic() - started
        print(
            f"{api}: {cases:,} cases from seed {args.seed} in {took:.0f} s; a line of 60 MiB against 15: {growth}",
            flush=True,
        )
        if long[1] > LINE_COPIES * 60 * 2**20 or long[0] > LINEAR * short[0]:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
