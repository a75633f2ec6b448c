"""What a real run leaves in Redis, recorded: the wire as writers write it.

`make wire` writes it to tests/contract/wire/v1, one JSON object a line. Record anew only
with a change that adds; one that breaks the readers of what is recorded needs a v2 beside it.
"""

import asyncio
import re
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeAlias

import orjson
from redis.asyncio import Redis

from deltafan import DeltafanError, Producer
from deltafan.testing import Answer, Audio, ScriptedUpstream, Text, scripted_upstream
from deltafan.testing import chat as script
from support.valkey import Valkey, valkey_server
from support.waiting import wait_until
from support.workers import running_worker, settings_env, worker_process

FOLDER = Path(__file__).parents[1] / "contract" / "wire" / "v1"
KINDS = ("entries", "states", "results", "usage", "arq_jobs", "arq_results", "requests")
Line: TypeAlias = dict[str, Any]

HI = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
_FULL: dict[str, Any] = {
    "body": {"tools": [TOOL]},
    "lane": "batch",
    "tenant": "acme",
    "metadata": {"a": "b"},
    "on_interrupt": "fail",
    "timeouts": {"total_s": 60},
    "ttl": 7200,
    "max_output_bytes": 100_000,
}


@dataclass
class Recorder:
    """Runs jobs and writes down all that they leave."""

    redis: Any
    producer: Producer
    upstream: ScriptedUpstream
    env: dict[str, str]
    lines: dict[str, list[Line]] = field(default_factory=lambda: {kind: [] for kind in KINDS})

    def add(self, kind: str, job: str, **fields: Any) -> None:
        self.lines[kind].append({"job": job, **fields})

    async def submit(self, job: str, *, model: str = "sim", **fields: Any) -> None:
        await self.producer.submit(model=model, messages=HI, job_id=job, **fields)
        self.add("arq_jobs", job, data=(await self.redis.get(f"arq:job:{job}")).decode())
        if (request := await self.redis.get(f"deltafan:{{{job}}}:request")) is not None:
            self.add("requests", job, data=request.decode())
        await self.note_state(job)

    async def note_state(self, job: str) -> None:
        fields = await self.redis.hgetall(f"deltafan:{{{job}}}:state")
        self.add("states", job, fields={name.decode(): value.decode() for name, value in fields.items()})

    async def at_rest(self, job: str) -> None:
        """The job has ended, and the queue knows."""
        await wait_until(lambda: self.redis.exists(f"arq:result:{job}"), f"{job} is closed")
        for entry_id, fields in await self.redis.xrange(f"deltafan:{{{job}}}:events"):
            names = [name.decode() for name in fields]
            self.add("entries", job, id=entry_id.decode(), fields=names, **_text(fields))
        await self.note_state(job)
        self.add("results", job, data=(await self.redis.get(f"deltafan:{{{job}}}:result")).decode())
        self.add("arq_results", job, data=(await self.redis.get(f"arq:result:{job}")).decode())

    async def run(self, job: str, **fields: Any) -> None:
        await self.submit(job, **fields)
        async with running_worker(self.env):
            await self.at_rest(job)


def _text(fields: Mapping[bytes, bytes]) -> Line:
    return {name.decode(): value.decode() for name, value in fields.items()}


async def _everything(recorder: Recorder) -> None:
    """Every type of delta in one answer, every option in one request."""
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}}
    more = {"index": 0, "function": {"arguments": '{"city": "Oslo"}'}}
    signed = {"index": 1, "id": "call_2", "function": {"name": "weather", "arguments": "{}"}}
    source = {"type": "url_citation", "url_citation": {"url": "https://example.org", "title": "Example"}}
    recorder.upstream.then(
        [
            script.delta(reasoning_content="Hm."),
            script.delta(content="Grüße"),
            script.delta(refusal="No."),
            script.delta(annotations=[source]),
            script.delta(tool_calls=[call]),
            script.delta(tool_calls=[more]),
            script.delta(tool_calls=[{**signed, "extra_content": {"google": {"thought_signature": "s"}}}]),
            *script.ending("tool_calls"),
        ]
    )
    await recorder.run("everything", deadline=datetime.now(UTC) + timedelta(minutes=5), **_FULL)


async def _speech(recorder: Recorder) -> None:
    recorder.upstream.then(Answer([Text("Hi"), Audio(b"\x00\x01" * 8, "Hi")]))
    await recorder.run("speech")


async def _restart(recorder: Recorder) -> None:
    recorder.upstream.then([script.delta(content="half"), script.Cut()])
    await recorder.run("restart")


async def _continue(recorder: Recorder) -> None:
    recorder.upstream.then([script.delta(content="kept "), script.Cut()], script.text("and on"))
    await recorder.run("continue", model="partial/x", on_interrupt="continue")


async def _background(recorder: Recorder) -> None:
    await recorder.run("background", model="background/x", api="responses", on_interrupt="continue")


async def _replay(recorder: Recorder) -> None:
    gate = asyncio.Event()
    recorder.upstream.then([script.delta(content="one "), gate, script.delta(content="two"), *script.ending()])
    await recorder.submit("replay")
    async with running_worker(recorder.env):
        key = "deltafan:{replay}:events"
        await wait_until(lambda: _length(recorder.redis, key, 2), "it is half-way")
        await recorder.note_state("replay")
        await recorder.redis.xdel(key, (await recorder.redis.xrevrange(key, count=1))[0][0])
        gate.set()
        await recorder.at_rest("replay")


async def _length(redis: Any, key: str, length: int) -> bool:
    return bool(await redis.xlen(key) == length)


async def _handed_over(recorder: Recorder) -> None:
    recorder.upstream.then([script.delta(content="void"), asyncio.Event()])
    await recorder.submit("handed-over")
    async with running_worker(recorder.env):
        await wait_until(lambda: _length(recorder.redis, "deltafan:{handed-over}:events", 2), "it runs")
    await recorder.note_state("handed-over")
    async with running_worker(recorder.env):
        await recorder.at_rest("handed-over")


async def _lost(recorder: Recorder) -> None:
    recorder.upstream.then([script.delta(content="void"), asyncio.Event()])
    await recorder.submit("lost")
    with worker_process(recorder.env | {"DELTAFAN_LEASE_S": "2"}) as process:
        await wait_until(lambda: _length(recorder.redis, "deltafan:{lost}:events", 2), "it runs")
        process.kill()
    async with running_worker(recorder.env):
        await recorder.at_rest("lost")


async def _failed(recorder: Recorder) -> None:
    recorder.upstream.then(script.Refuse(400, b'{"error": {"message": "no", "code": "invalid_request_error"}}'))
    await recorder.run("failed")


async def _cancelled(recorder: Recorder) -> None:
    recorder.upstream.then([script.delta(content="Once upon"), asyncio.Event()])
    await recorder.submit("cancelled")
    async with running_worker(recorder.env):
        await wait_until(lambda: _length(recorder.redis, "deltafan:{cancelled}:events", 2), "it runs")
        await recorder.producer.cancel("cancelled", reason="the user left")
        await recorder.at_rest("cancelled")


async def _cancelled_waiting(recorder: Recorder) -> None:
    await recorder.submit("cancelled-waiting")
    await recorder.producer.cancel("cancelled-waiting")
    async with running_worker(recorder.env):
        await recorder.at_rest("cancelled-waiting")


async def _too_many(recorder: Recorder) -> None:
    await recorder.submit("too-many-attempts")
    await recorder.redis.hset("deltafan:{too-many-attempts}:state", "runs", 3)
    async with running_worker(recorder.env):
        await recorder.at_rest("too-many-attempts")


_SCENARIOS = (
    _everything,
    _speech,
    _restart,
    _continue,
    _background,
    _replay,
    _handed_over,
    _lost,
    _failed,
    _cancelled,
    _cancelled_waiting,
    _too_many,
)


@asynccontextmanager
async def _recorder(valkey: Valkey, folder: Path) -> AsyncIterator[Recorder]:
    async with (
        Redis.from_url(valkey.url) as redis,
        Producer.connect(valkey.url) as producer,
        scripted_upstream() as upstream,
    ):
        yield Recorder(redis, producer, upstream, settings_env(valkey.url, upstream.url, folder))


async def record(valkey: Valkey, folder: Path) -> dict[str, list[Line]]:
    """Run every scenario on an empty server and return what each left, by kind."""
    async with _recorder(valkey, folder) as recorder:
        for scenario in _SCENARIOS:
            await scenario(recorder)
        for _, fields in await recorder.redis.xrange("deltafan:usage"):
            recorder.lines["usage"].append({"fields": [name.decode() for name in fields], **_text(fields)})
        return recorder.lines


def recorded(kind: str) -> list[Line]:
    """What the files hold."""
    return [orjson.loads(line) for line in (FOLDER / f"{kind}.jsonl").read_bytes().splitlines()]


def _write(lines: Mapping[str, list[Line]]) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    worker = re.compile(rb"%s:\d+" % re.escape(socket.gethostname().encode()))
    for kind in KINDS:
        text = b"".join(orjson.dumps(line) + b"\n" for line in lines[kind])
        (FOLDER / f"{kind}.jsonl").write_bytes(worker.sub(b"host:1", text))


def _main() -> None:
    with valkey_server() as valkey, tempfile.TemporaryDirectory() as folder:
        _write(asyncio.run(record(valkey, Path(folder))))
    sys.stdout.write(f"recorded to {FOLDER}\n")


if __name__ == "__main__":
    try:
        _main()
    except DeltafanError as error:
        sys.exit(str(error))
