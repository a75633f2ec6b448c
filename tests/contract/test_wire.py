"""Compatibility: today's code reads what v1 wrote, and still writes the same.

`wire/v1/*.jsonl` is what a real run left in Redis when v1 was recorded (`make wire`). Fields may be added; then record
anew.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import orjson
import pytest
from redis.asyncio import Redis

from deltafan import Consumer, Generation, JobConflict, JobEnded, Position, Producer, UsageRecord, fold
from deltafan._events import KNOWN_TYPES, Event
from deltafan._follow import Follower
from deltafan._request import parse_request
from deltafan._usage import CallOutcome
from deltafan.testing import scripted_upstream
from deltafan_worker.serialization import deserialize
from support.valkey import Valkey
from support.waiting import wait_until
from support.wire import FOLDER, HI, KINDS, Line, record, recorded
from support.workers import running_worker, settings_env

LITERAL = frozenset({"type", "status", "mode", "outcome", "source", "code", "lane", "api", "on_interrupt", "f", "v"})
"""Members whose values are the protocol's own words."""


def shape(value: Any, name: str = "") -> Any:
    """Names and types, values only where they are words of the protocol."""
    if name in LITERAL:
        return value
    if isinstance(value, str) and value.startswith("{"):
        return {"json": shape(orjson.loads(value))}
    if isinstance(value, dict):
        calls = [shape(value[key]) for key in value if key.startswith("u:")]
        members = {key: shape(value[key], key) for key in sorted(value) if not key.startswith("u:")}
        return members | ({"u:<call>": sorted(calls, key=repr)} if calls else {})
    if isinstance(value, list):
        return [shape(member) for member in value]
    return type(value).__name__


def jobs(kind: str) -> list[str]:
    return list(dict.fromkeys(line["job"] for line in recorded(kind)))


def events(job: str) -> list[Event]:
    lines = [line for line in recorded("entries") if line["job"] == job]
    raw = [
        (line["id"].encode(), [b"type", line["type"].encode(), b"data", line["data"].encode()])
        for line in lines
        if line["fields"] == ["type", "data"]
    ]
    assert len(raw) == len(lines), "a type, then data"
    taken = Follower().take(raw)
    assert taken[-1].position == Position.parse(raw[-1][0]), "to the end, past the hole that a replay leaves"
    return taken


def test_every_type_and_mode_is_recorded() -> None:
    lines = recorded("entries")
    assert {line["type"] for line in lines} == KNOWN_TYPES
    modes = {orjson.loads(line["data"])["mode"] for line in lines if line["type"] == "started"}
    assert modes == {"fresh", "restart", "replay", "continue"}
    assert {orjson.loads(line["data"])["outcome"] for line in recorded("usage")} == set(get_args(CallOutcome))
    assert {path.stem for path in FOLDER.glob("*.jsonl")} == set(KINDS)


@pytest.mark.parametrize("job", jobs("entries"))
def test_todays_fold_of_the_recorded_entries_is_the_recorded_result(job: str) -> None:
    (data,) = [line["data"] for line in recorded("results") if line["job"] == job]
    result = Generation.from_json(orjson.loads(data))
    folded = fold(events(job))
    assert folded.to_json() | {"attempt_no": 0} == result.to_json() | {"attempt_no": 0}
    assert result.is_ended
    assert Generation.from_json(result.to_json()) == result


def test_a_continued_answer_keeps_what_the_new_attempt_says() -> None:
    generation = fold(events("continue"))
    assert (generation.status, generation.content, generation.attempt_no) == ("completed", "kept and on", 2)


def test_recorded_bills_are_read_whole() -> None:
    for line in recorded("usage"):
        assert line["fields"] == ["job", "call", "data"]
        data = orjson.loads(line["data"])
        assert UsageRecord.from_json(data).to_json() == data
        assert (data["job_id"], data["call_id"]) == (line["job"], line["call"])


def test_recorded_job_records_and_requests_are_read() -> None:
    for line in recorded("arq_jobs"):
        fields = deserialize(line["data"].encode())
        assert fields["f"] == "deltafan.generate"
        assert HI in parse_request(fields["k"]).body.values()
    for line in recorded("requests"):
        assert parse_request(orjson.loads(line["data"])).body["messages"] == HI
    for line in recorded("arq_results"):
        assert deserialize(line["data"].encode())["r"]["job_id"] == line["job"]


def _queued() -> Iterator[tuple[str, Line, str]]:
    """Each job as its submit left it: id, state, arq's record."""
    for job in jobs("arq_jobs"):
        state = next(line["fields"] for line in recorded("states") if line["job"] == job)
        (record,) = [line["data"] for line in recorded("arq_jobs") if line["job"] == job]
        yield job, state, record


async def test_todays_worker_runs_the_recorded_jobs(
    redis: Redis, redis_url: str, consumer: Consumer, tmp_path: Path
) -> None:
    for job, state, stored in _queued():
        arguments = orjson.loads(stored)
        arguments["k"].pop("deadline", None)  # it has passed long ago
        await _put(redis, job, state)
        await redis.set(f"arq:job:{job}", orjson.dumps(arguments), ex=600)
        await redis.zadd(f"deltafan:queue:{arguments['k']['lane']}", {job: 1})
    async with scripted_upstream() as upstream, running_worker(settings_env(redis_url, upstream.url, tmp_path)):
        for job, _, _ in _queued():
            assert (await consumer.result(job, timeout=10)).content == "Hello, world!"
            await wait_until(lambda job=job: redis.exists(f"arq:result:{job}"), "it is closed")  # type: ignore[misc]


async def _put(redis: Any, job: str, fields: Line, result: str | None = None) -> None:
    await redis.hset(f"deltafan:{{{job}}}:state", mapping=fields)
    await redis.expire(f"deltafan:{{{job}}}:state", 600)
    if result is not None:
        await redis.set(f"deltafan:{{{job}}}:result", result, ex=600)


@pytest.mark.parametrize(
    ("job", "status", "attempt_no", "outcome"),
    [("replay", "running", 2, "lost"), ("handed-over", "queued", 1, "handed_over")],
)
async def test_todays_worker_takes_over_a_recorded_run(
    job: str,
    status: str,
    attempt_no: int,
    outcome: str,
    redis: Redis,
    redis_url: str,
    consumer: Consumer,
    tmp_path: Path,
) -> None:
    """Its worker of v1 has died in mid-answer, or has given it back there."""
    _, begun, _ = (line["fields"] for line in recorded("states") if line["job"] == job)
    assert begun["status"] == status
    await _put(redis, job, begun)
    events = f"deltafan:{{{job}}}:events"
    for line in [one for one in recorded("entries") if one["job"] == job][:2]:
        await redis.xadd(events, {"type": line["type"], "data": line["data"]}, id=line["id"])
    await redis.expire(events, 600)
    (stored,) = [line["data"] for line in recorded("arq_jobs") if line["job"] == job]
    await redis.set(f"arq:job:{job}", stored, ex=600)
    await redis.zadd("deltafan:queue:interactive", {job: 1})
    await redis.set(f"arq:retry:{job}", 1, ex=600)
    async with scripted_upstream() as upstream, running_worker(settings_env(redis_url, upstream.url, tmp_path)):
        result = await consumer.result(job, timeout=10)
        await wait_until(lambda: redis.exists(f"arq:result:{job}"), "it is closed")
    assert (result.content, result.attempt_no) == ("Hello, world!", attempt_no)
    bills = [orjson.loads(fields[b"data"]) for _, fields in await redis.xrange("deltafan:usage")]
    assert sorted(bill["outcome"] for bill in bills) == ["completed", outcome]


async def test_a_recorded_end_is_the_end(redis: Redis, producer: Producer, consumer: Consumer) -> None:
    for line in recorded("results"):
        job = line["job"]
        ended = [state["fields"] for state in recorded("states") if state["job"] == job][-1]
        await _put(redis, job, ended, line["data"])
        assert await producer.cancel(job) == "ended"
        with pytest.raises(JobConflict):
            await producer.submit(model="other", messages=HI, job_id=job)
        if ended["status"] == "completed":
            assert (await consumer.result(job)).to_json() == Generation.from_json(orjson.loads(line["data"])).to_json()
        else:
            with pytest.raises(JobEnded):
                await consumer.result(job)


def _shapes(kind: str, lines: list[Line]) -> list[Any]:
    shapes = [(line["job"], shape(line)) for line in lines]
    # A job's calls reach the ledger in any order.
    return sorted(shapes, key=repr) if kind == "usage" else shapes


async def test_todays_writer_writes_the_recorded_shapes(fresh_valkey: Valkey, tmp_path: Path) -> None:
    written = await record(fresh_valkey, tmp_path)
    for kind in KINDS:
        now, then = (_shapes(kind, lines) for lines in (written[kind], recorded(kind)))
        assert now == then, f"{kind}: not what v1 recorded; readers of v1 must go on understanding it"
