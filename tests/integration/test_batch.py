"""`Batch` on a real worker: what it does with rows that failed, ended early, or can not go in."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import pytest
from redis.asyncio import Redis

from deltafan import Consumer, InvalidRequest, Job, JobCancelled, JobFailed, JobNotFound, Producer, RedisUnavailable
from deltafan.batch import Batch, Outcome, Row
from deltafan.batch._ids import job_id_of
from deltafan.testing import Answer, Refuse, ScriptedUpstream, Text
from support.waiting import wait_until
from support.workers import running_worker

NO = Refuse(400, b'{"error": {"message": "no", "code": "invalid_request_error"}}')


def rows(count: int, text: str = "row") -> list[Row]:
    return [
        Row(n, f"r{n}", "sim", "chat", {"messages": [{"role": "user", "content": f"{text} {n}"}]}) for n in range(count)
    ]


async def endings(batch: Batch, given: Any) -> dict[str, bool]:
    return {outcome.row.custom_id: outcome.is_answer async for outcome in batch.run(given)}


async def test_what_failed_before_this_run_is_tried_again_and_answers_are_taken(
    producer: Producer, consumer: Consumer, env: dict[str, str], upstream: ScriptedUpstream
) -> None:
    upstream.then(*[NO] * 3)
    async with running_worker(env):
        first = await endings(Batch(producer, consumer, batch_id="b"), rows(10))
        again = await endings(Batch(producer, consumer, batch_id="b"), rows(10))
    assert (list(first.values()).count(False), all(again.values())) == (3, True)
    assert len(upstream.requests) == 13


async def test_rows_come_from_an_async_iterator_as_they_arrive_and_a_stop_is_heard_at_once(
    producer: Producer, consumer: Consumer, env: dict[str, str], upstream: ScriptedUpstream
) -> None:
    batch = Batch(producer, consumer, batch_id="b")

    async def slow() -> AsyncIterator[Row]:
        for row in rows(3):
            yield row
        await asyncio.Event().wait()

    async with running_worker(env), aclosing(batch.run(slow())) as outcomes:
        for _ in range(3):
            await asyncio.wait_for(anext(outcomes), 10)
        batch.stop()
        with pytest.raises(StopAsyncIteration):
            await asyncio.wait_for(anext(outcomes), 10)


async def test_leaving_it_early_raises_what_the_taker_raised_and_nothing_else(
    producer: Producer, consumer: Consumer, env: dict[str, str], upstream: ScriptedUpstream
) -> None:
    async def take_one(error: Exception | None) -> None:
        async with aclosing(Batch(producer, consumer, batch_id="b", window=5).run(rows(50))) as outcomes:
            async for _ in outcomes:
                if error is not None:
                    raise error
                break

    async with running_worker(env):
        await take_one(None)
        with pytest.raises(OSError, match="disk full"):
            await take_one(OSError("disk full"))


async def test_another_prompt_under_a_rows_id_is_an_error_that_names_the_row(
    producer: Producer, consumer: Consumer, env: dict[str, str], upstream: ScriptedUpstream
) -> None:
    async with running_worker(env):
        await endings(Batch(producer, consumer, batch_id="nightly"), rows(3))
        with pytest.raises(InvalidRequest, match=r"'r0', is another prompt than .* an earlier one of nightly"):
            await endings(Batch(producer, consumer, batch_id="nightly"), rows(3, "other"))


async def test_a_full_lane_is_waited_for(
    redis_url: str, consumer: Consumer, env: dict[str, str], upstream: ScriptedUpstream
) -> None:
    async with Producer.connect(redis_url, max_queued=5) as producer, asyncio.TaskGroup() as tasks:
        batch = Batch(producer, consumer, batch_id="b")
        run = tasks.create_task(endings(batch, rows(30)))
        await wait_until(lambda: batch.held_up == "the lane is full", "it says so")
        async with running_worker(env):
            ends = await run
    assert (len(ends), all(ends.values()), len(upstream.requests), batch.held_up) == (30, True, 30, "")


async def test_what_fails_while_its_submit_is_not_known_to_have_arrived_is_this_runs_failure(
    producer: Producer,
    consumer: Consumer,
    env: dict[str, str],
    upstream: ScriptedUpstream,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    upstream.standing = NO
    submit_many, lost = producer.submit_many, list[Job]()

    async def losing(requests: Any) -> Any:
        jobs = await submit_many(requests)
        if not lost:
            lost.extend(jobs)
            with pytest.raises(JobFailed):
                await consumer.result(jobs[0].id, timeout=10)
            raise RedisUnavailable("redis://here", "the answer was lost")
        return jobs

    monkeypatch.setattr(producer, "submit_many", losing)
    async with running_worker(env):
        assert await endings(Batch(producer, consumer, batch_id="b"), rows(1)) == {"r0": False}
    assert len(upstream.requests) == 1


async def test_the_window_may_change_with_what_was_taken(
    producer: Producer, consumer: Consumer, env: dict[str, str], upstream: ScriptedUpstream
) -> None:
    taken, most = 0, 0
    batch = Batch(producer, consumer, batch_id="b", window=lambda: 1 + taken)
    async with running_worker(env), aclosing(batch.run(rows(12))) as outcomes:
        async for _ in outcomes:
            most = max(most, len(batch.in_flight))
            assert len(batch.in_flight) <= taken
            taken += 1
    assert most > 1


async def test_a_closed_window_ends_the_run_only_when_nothing_is_in_flight_that_could_open_it(
    producer: Producer, consumer: Consumer, env: dict[str, str], upstream: ScriptedUpstream
) -> None:
    taken = 0

    async def take(window: Callable[[], int]) -> int:
        nonlocal taken
        taken = 0
        async with aclosing(Batch(producer, consumer, batch_id="b", window=window).run(rows(20))) as outcomes:
            async for _ in outcomes:
                taken += 1
        return taken

    async with running_worker(env):
        assert await asyncio.wait_for(take(lambda: 3 if taken < 5 else 0), 20) in range(5, 8)
        assert await take(lambda: 0 if taken == 1 else 3) == 20
        assert await asyncio.wait_for(take(lambda: 0), 20) == 0


async def test_cancelling_ends_what_is_in_flight(
    producer: Producer, consumer: Consumer, env: dict[str, str], upstream: ScriptedUpstream
) -> None:
    upstream.standing = [asyncio.Event()]
    batch = Batch(producer, consumer, batch_id="b", window=20)
    async with running_worker(env), asyncio.TaskGroup() as tasks:
        run = tasks.create_task(endings(batch, rows(50)))
        await wait_until(lambda: upstream.requests, "it runs")
        await batch.cancel()
    assert run.result() == {f"r{n}": False for n in range(20)}


async def test_what_is_withdrawn_costs_nothing_has_no_outcome_and_waits_for_the_next_run(
    producer: Producer,
    consumer: Consumer,
    env: dict[str, str],
    upstream: ScriptedUpstream,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = asyncio.Event()
    upstream.standing = Answer([gate, Text("Hello")])
    batch = Batch(producer, consumer, batch_id="b", window=20)
    async with running_worker(env | {"DELTAFAN_CONCURRENCY": "2"}), asyncio.TaskGroup() as tasks:
        run = tasks.create_task(endings(batch, rows(50)))
        await wait_until(lambda: upstream.requests, "it runs")
        await batch.withdraw()
        await wait_until(lambda: len(batch.in_flight) <= 2, "only what runs is left")
        await batch.withdraw()
        gate.set()
    assert run.result() == dict.fromkeys(run.result(), True)
    assert len(run.result()) == len(upstream.requests) <= 2

    _lose_first_submit(producer, monkeypatch)
    async with running_worker(env):
        again = await endings(Batch(producer, consumer, batch_id="b"), rows(50))
    assert again == {f"r{n}": True for n in range(50)}
    assert len(upstream.requests) == 50


def _lose_first_submit(producer: Producer, monkeypatch: pytest.MonkeyPatch) -> None:
    submit_many = producer.submit_many

    async def losing(_requests: Any) -> Any:
        monkeypatch.setattr(producer, "submit_many", submit_many)
        raise RedisUnavailable("redis://here", "it was lost on the way")

    monkeypatch.setattr(producer, "submit_many", losing)


async def test_what_is_submitted_while_the_batch_is_withdrawn_is_taken_back_too(
    producer: Producer, consumer: Consumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, submit_many = Batch(producer, consumer, batch_id="b"), producer.submit_many

    async def slow(requests: Any) -> Any:
        await batch.withdraw()
        return await submit_many(requests)

    monkeypatch.setattr(producer, "submit_many", slow)
    assert await asyncio.wait_for(endings(batch, rows(3)), 10) == {}
    assert await producer.cancel(job_id_of("b", "r0", 0)) == "ended"


async def test_an_outcome_tells_a_later_run_the_number_of_the_next_try_also_when_one_was_withdrawn(
    producer: Producer,
    consumer: Consumer,
    env: dict[str, str],
    upstream: ScriptedUpstream,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def outcome(tries: Callable[[Row], int] | None = None) -> Outcome:
        batch = Batch(producer, consumer, batch_id="b", tries=tries)
        (only,) = [outcome async for outcome in batch.run(rows(1))]
        return only

    first = Batch(producer, consumer, batch_id="b")
    async with asyncio.TaskGroup() as tasks:
        run = tasks.create_task(endings(first, rows(1)))
        await wait_until(lambda: first.in_flight, "it waits")
        await first.withdraw()
    assert run.result() == {}
    upstream.then(NO)
    async with running_worker(env):
        failed = await outcome()
        assert (failed.is_answer, failed.tries) == (False, 2), "the withdrawn try is one of them"
        _lose_first_submit(producer, monkeypatch)
        answered = await outcome(lambda _: failed.tries)
    assert (answered.is_answer, answered.tries, len(upstream.requests)) == (True, 3, 2)


async def test_what_another_runner_withdraws_gets_its_next_try_and_none_once_this_one_stops(
    producer: Producer, consumer: Consumer, env: dict[str, str], upstream: ScriptedUpstream
) -> None:
    first, second, third = (Batch(producer, consumer, batch_id="b") for _ in range(3))
    async with asyncio.TaskGroup() as tasks:
        runs = [tasks.create_task(endings(batch, rows(20))) for batch in (first, second, third)]
        await wait_until(lambda: all(len(batch.in_flight) == 20 for batch in (first, second, third)), "all wait")
        third.stop()
        await first.withdraw()
        await wait_until(lambda: job_id_of("b", "r19", 1) in second.in_flight, "it goes on with them")
        async with running_worker(env):
            assert await runs[1] == {f"r{n}": True for n in range(20)}
    assert runs[0].result() == runs[2].result() == {}
    assert (second.in_flight, third.in_flight, len(upstream.requests)) == ({}, {}, 20)


async def test_a_next_try_that_is_submitted_while_the_batch_is_withdrawn_is_taken_back_too(
    producer: Producer, consumer: Consumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (Batch(producer, consumer, batch_id="b") for _ in range(2))
    submit_many = producer.submit_many

    async def slow(requests: Any) -> Any:
        await second.withdraw()
        return await submit_many(requests)

    async with asyncio.TaskGroup() as tasks:
        runs = [tasks.create_task(endings(batch, rows(1))) for batch in (first, second)]
        await wait_until(lambda: first.in_flight and second.in_flight, "both wait")
        monkeypatch.setattr(producer, "submit_many", slow)
        await first.withdraw()
        assert await asyncio.wait_for(runs[1], 10) == {}
    assert await producer.cancel(job_id_of("b", "r0", 1)) == "ended"


async def test_what_is_cancelled_from_elsewhere_before_its_submit_is_known_to_have_arrived_stays_cancelled(
    producer: Producer,
    consumer: Consumer,
    env: dict[str, str],
    upstream: ScriptedUpstream,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    submit_many, arrived = producer.submit_many, asyncio.Event()

    async def losing(requests: Any) -> Any:
        jobs = await submit_many(requests)
        if not arrived.is_set():
            arrived.set()
            with pytest.raises(JobCancelled):
                await consumer.result(jobs[0].id, timeout=10)
            raise RedisUnavailable("redis://here", "the answer was lost")
        return jobs

    monkeypatch.setattr(producer, "submit_many", losing)
    await producer.report_batch("b", {"status": "running"}, is_first=True)
    async with asyncio.TaskGroup() as tasks:
        run = tasks.create_task(endings(Batch(producer, consumer, batch_id="b"), rows(1)))
        await arrived.wait()
        await producer.cancel_batch("b")
        async with running_worker(env):
            assert await run == {"r0": False}
    assert not upstream.requests


async def test_rows_that_a_dead_runner_has_left_are_cancelled_by_the_workers(
    producer: Producer, consumer: Consumer, env: dict[str, str], upstream: ScriptedUpstream, redis: Redis
) -> None:
    await producer.report_batch("b", {"status": "running"}, is_first=True)
    dying = asyncio.create_task(endings(Batch(producer, consumer, batch_id="b"), rows(20)))
    await wait_until(lambda: _queued(redis, 20), "all are submitted")
    dying.cancel()
    await asyncio.wait([dying])
    await producer.report_batch("b", {"status": "interrupted"})
    await producer.cancel_batch("b")
    async with running_worker(env):
        assert await endings(Batch(producer, consumer, batch_id="other"), rows(1)) == {"r0": True}
        await wait_until(lambda: _queued(redis, 0), "all have ended")
        assert len(upstream.requests) == 1
        again = await endings(Batch(producer, consumer, batch_id="b"), rows(20))
        assert list(again.values()) == [True] * 20, "what is submitted later is not meant"


async def _queued(redis: Redis, count: int) -> bool:
    return bool(await redis.zcard("deltafan:queue:batch") == count)


async def test_only_a_running_batch_can_be_cancelled_and_the_next_run_knows_nothing_of_it(
    producer: Producer, redis_url: str
) -> None:
    with pytest.raises(JobNotFound):
        await producer.cancel_batch("b")
    assert await producer.batches() == {}, "asking leaves nothing behind"
    assert not await producer.report_batch("b", {"status": "running"}, is_first=True)
    assert 0 <= await producer.cancel_batch("b") < 10
    assert await producer.report_batch("b", {"status": "running"}), "the runner hears it"
    await producer.report_batch("b", {"status": "cancelled"})
    with pytest.raises(InvalidRequest, match="batch b is cancelled; there is nothing to cancel"):
        await producer.cancel_batch("b")
    assert not await producer.report_batch("b", {"status": "running"}, is_first=True)
