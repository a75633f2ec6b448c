"""What a run that is cut short, or gives its job away, leaves behind: the bill, the reason, the slot."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
import pytest
from redis.asyncio import Redis

from deltafan import Consumer, JobCancelled, Producer, UsageRecord
from deltafan.testing import ScriptedUpstream
from deltafan.testing import chat as script
from deltafan_worker import _run
from deltafan_worker._calls import ModelCalls
from deltafan_worker._ending import Ending
from deltafan_worker._interrupt import Reason
from deltafan_worker._leased import LeasedWorker
from deltafan_worker._writer import StreamWriter
from support.waiting import wait_until
from support.workers import running_worker

HI = [{"role": "user", "content": "Hi"}]
TOO_FAST = script.refusal("rate_limit_exceeded", "too fast", 429)

Meanwhile = Callable[[StreamWriter], Awaitable[object]]


async def bills(redis: Redis) -> list[tuple[str, str]]:
    entries = await redis.xrange("deltafan:usage")
    records = [UsageRecord.from_json(orjson.loads(fields[b"data"])) for _, fields in entries]
    return [(record.outcome, record.source) for record in records]


def before(monkeypatch: pytest.MonkeyPatch, name: str, meanwhile: Meanwhile) -> None:
    """Let something happen just before a writer's step."""
    step = getattr(StreamWriter, name)

    async def late(writer: StreamWriter, *args: Any, **options: Any) -> Any:
        await meanwhile(writer)
        return await step(writer, *args, **options)

    monkeypatch.setattr(StreamWriter, name, late)


async def taken_by_another(redis: Redis, writer: StreamWriter) -> None:
    await redis.hset(writer.state_key, mapping={"run": "another", "claim": 99, "attempt": writer.attempt + 1})  # type: ignore[misc]


async def test_a_hand_over_of_what_is_anothers_by_now_bills_what_was_used(
    producer: Producer,
    redis: Redis,
    env: dict[str, str],
    upstream: ScriptedUpstream,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before(monkeypatch, "hand_over", lambda writer: taken_by_another(redis, writer))
    upstream.then([script.delta(content="Hello"), asyncio.Event()])
    async with running_worker(env):
        job = await producer.submit(model="sim", messages=HI)

        async def has_published() -> bool:
            return int(await redis.xlen(f"deltafan:{{{job.id}}}:events")) == 2

        await wait_until(has_published, "it has published")
    assert await bills(redis) == [("interrupted", "estimated")]


async def test_a_restart_of_what_is_anothers_by_now_bills_what_was_used(
    producer: Producer,
    redis: Redis,
    worker: LeasedWorker,
    upstream: ScriptedUpstream,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def if_it_is_a_restart(writer: StreamWriter) -> None:
        if writer.run:
            await taken_by_another(redis, writer)

    before(monkeypatch, "begin", if_it_is_a_restart)
    upstream.then([script.delta(content="Hello"), script.Cut()])
    await producer.submit(model="sim", messages=HI)
    await wait_until(lambda: redis.exists("deltafan:usage"), "it is billed")
    assert await bills(redis) == [("interrupted", "estimated")]


async def test_a_hand_over_before_the_model_is_called_leaves_no_bill(
    producer: Producer,
    consumer: Consumer,
    redis: Redis,
    worker: LeasedWorker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut = False

    async def hand_over_once(writer: StreamWriter) -> None:
        nonlocal cut
        if not cut:
            cut = True
            writer.interrupt.cut(Reason.HAND_OVER)

    before(monkeypatch, "begin", hand_over_once)
    job = await producer.submit(model="sim", messages=HI)
    assert (await consumer.result(job.id, timeout=10)).attempt_no == 1
    await wait_until(lambda: redis.exists("deltafan:usage"), "it is billed")
    assert await bills(redis) == [("completed", "provider")]


async def test_a_hand_over_before_the_job_has_begun_is_to_whoever_comes_first(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_run, "RELEASE_DELAY_MS", 60_000)
    launch, launched = worker._launch, []

    def hand_over_once(claim: Any) -> None:
        launched.append(claim)
        launch(claim)
        if len(launched) == 1:
            worker._interrupt(claim, Reason.HAND_OVER)

    monkeypatch.setattr(worker, "_launch", hand_over_once)
    job = await producer.submit(model="sim", messages=HI)
    await consumer.result(job.id, timeout=10)
    assert len(launched) == 2


async def test_the_reason_of_a_cancel_is_kept_that_comes_while_a_job_steps_back(
    producer: Producer,
    consumer: Consumer,
    worker: LeasedWorker,
    upstream: ScriptedUpstream,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before(monkeypatch, "hand_over", lambda writer: producer.cancel(writer.job_id, reason="enough"))
    upstream.standing = TOO_FAST
    job = await producer.submit(model="sim", messages=HI, lane="batch")
    with pytest.raises(JobCancelled, match="enough"):
        await consumer.result(job.id, timeout=10)


async def test_a_cancel_is_heard_while_what_was_left_upstream_is_ended(
    producer: Producer,
    consumer: Consumer,
    worker: LeasedWorker,
    upstream: ScriptedUpstream,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ending = asyncio.Event()

    async def slow(*_: object) -> None:
        if not ending.is_set():
            ending.set()
            await asyncio.Event().wait()

    monkeypatch.setattr("deltafan_worker._calls.ModelCalls.end_background", slow)
    job = await producer.submit(model="sim", messages=HI)
    await asyncio.wait_for(ending.wait(), 10)
    await producer.cancel(job.id)
    with pytest.raises(JobCancelled):
        await consumer.result(job.id, timeout=10)
    assert not upstream.requests


@pytest.mark.parametrize(("reason", "outcome"), [(Reason.HAND_OVER, "handed_over"), (Reason.LEASE_LOST, "interrupted")])
async def test_an_answer_that_breaks_as_its_job_is_given_away_does_not_end_the_job(
    reason: Reason,
    outcome: str,
    producer: Producer,
    consumer: Consumer,
    redis: Redis,
    worker: LeasedWorker,
    upstream: ScriptedUpstream,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer, calls = ModelCalls.answer, 0

    async def broken_once(self: ModelCalls, routes: Any, body: Any, writer: StreamWriter, *rest: Any) -> Ending:
        nonlocal calls
        calls += 1
        ending = await answer(self, routes, body, writer, *rest)
        if calls > 1:
            return ending
        writer.interrupt.cut(reason)
        return Ending.failed("connection_lost", "it broke", retryable=True)

    monkeypatch.setattr(ModelCalls, "answer", broken_once)
    job = await producer.submit(model="sim", messages=HI)
    assert (await consumer.result(job.id, timeout=15)).content == "Hello, world!"
    await wait_until(lambda: not worker.tasks, "the queue is told")
    assert sorted(await bills(redis)) == [("completed", "provider"), (outcome, "provider")]
