"""Leases, and the worker that holds them, where the queue's server or the moment is unkind."""

import asyncio
import logging
import signal
import time
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from deltafan import Consumer, JobCancelled, JobFailed, Producer
from deltafan._background import background
from deltafan._keys import FUNCTION
from deltafan.testing import ScriptedUpstream
from deltafan.testing import chat as script
from deltafan_config import load_settings
from deltafan_worker import _leased
from deltafan_worker._claim import Claim
from deltafan_worker._interrupt import Reason
from deltafan_worker._leased import CLAIMED_AT_ONCE, LeasedWorker
from deltafan_worker._queue_pool import run_script
from deltafan_worker._writer import StreamWriter
from deltafan_worker.main import open_worker
from support.proxy import TcpProxy, tcp_proxy
from support.valkey import Valkey
from support.waiting import wait_until
from support.workers import running_worker, settings_env, worker_process

HI = [{"role": "user", "content": "Hi"}]
QUEUE = "deltafan:queue:interactive"


def a_claim(number: int) -> Claim:
    return Claim(job_id="j", queue="q", queue_index=1, token=f"me:{number}", number=number, score="1")


async def test_a_worker_that_can_not_give_a_job_back_can_still_be_stopped(
    producer: Producer, valkey: Valkey, upstream: ScriptedUpstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_leased, "HAND_OVER_S", 0.3)
    gate = asyncio.Event()

    async def broken(*_: object, **__: object) -> None:
        await gate.wait()
        raise ZeroDivisionError

    monkeypatch.setattr(StreamWriter, "finish", broken)
    async with tcp_proxy(valkey.port) as proxy:
        env = settings_env(proxy.url, upstream.url, tmp_path, streams_url=valkey.url)
        async with running_worker(env) as worker:
            await producer.submit(model="sim", messages=HI)
            await wait_until(lambda: worker.tasks, "it runs")
            (claim,) = worker.claims.values()
            await wait_until(lambda: claim.interrupt is not None, "it has begun")
            proxy.refuses = True
            proxy.cut()
            gate.set()
            await wait_until(lambda: not claim.renewed, "it is to be given back")
        assert not worker.tasks


async def test_a_connection_that_falls_silent_does_not_cost_the_leases(
    producer: Producer,
    consumer: Consumer,
    upstream: ScriptedUpstream,
    redis: Redis,
    redis_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    beats, gate = 0, asyncio.Event()

    async def silent_once(pool: Any, script: Any, *args: Any, **options: Any) -> Any:
        nonlocal beats
        if script.name == "beat" and args[1][1:]:  # one that renews something
            beats += 1
            if beats == 1:
                await asyncio.Event().wait()
        return await run_script(pool, script, *args, **options)

    monkeypatch.setattr(_leased, "run_script", silent_once)
    upstream.then([script.delta(content="Hello, "), gate, script.delta(content="world!"), *script.ending()])
    async with running_worker(settings_env(redis_url, upstream.url, tmp_path, lease_s=2)):
        job = await producer.submit(model="sim", messages=HI)
        await wait_until(lambda: beats > 2, "the next heartbeats do not wait for the silent one")
        assert await redis.exists(f"arq:in-progress:{job.id}")
        gate.set()
        assert (await consumer.result(job.id, timeout=10)).content == "Hello, world!"
    assert len(upstream.requests) == 1


async def test_a_job_that_is_taken_again_while_it_is_being_given_back_runs_again(
    worker: LeasedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, ran = asyncio.Event(), []

    async def run_job(job_id: str, _score: int) -> None:
        ran.append(worker.claims[job_id].token)
        await gate.wait()

    monkeypatch.setattr(worker, "run_job", run_job)
    worker._launch(first := a_claim(1))
    await wait_until(lambda: ran, "the first runs")
    worker._launch(a_claim(2))
    assert first.token == "me:2", "a lease that had run out is the same claim's again"
    first.renewed = False
    worker._launch(a_claim(3))
    gate.set()
    await wait_until(lambda: not worker.tasks, "both are over")
    assert ran == ["me:1", "me:3"]
    assert not worker.claims


async def lend(redis: Redis, claim: Claim) -> None:
    """Another worker has a job of ours for a moment and gives it back."""
    await redis.set(f"arq:in-progress:{claim.job_id}", "another:99", px=60_000)
    await wait_until(lambda: not claim.renewed, "we learn that it is another's")
    await redis.delete(f"arq:in-progress:{claim.job_id}")
    await redis.zadd(claim.queue, {claim.job_id: 1}, xx=True)


async def test_a_job_that_is_taken_again_before_its_lost_run_has_left_is_not_destroyed_by_that(
    producer: Producer, consumer: Consumer, redis: Redis, valkey: Valkey, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    async with tcp_proxy(valkey.port) as streams:
        env = settings_env(valkey.url, upstream.url, tmp_path, streams_url=streams.url, lease_s=2)
        streams.refuses = True
        async with running_worker(env) as worker:
            job = await producer.submit(model="sim", messages=HI)
            await wait_until(lambda: any(claim.interrupt for claim in worker.claims.values()), "it waits to begin")
            (first,) = worker.claims.values()
            await lend(redis, first)
            await wait_until(lambda: worker.claims[job.id] is not first, "it is taken again")
            streams.refuses = False
            assert (await consumer.result(job.id, timeout=15)).content == "Hello, world!"
            await wait_until(lambda: redis.exists(f"arq:result:{job.id}"), "the queue is told")
        assert not worker.claims


async def test_a_job_without_a_record_that_is_another_workers_is_left_to_it(
    producer: Producer, consumer: Consumer, redis: Redis, env: dict[str, str]
) -> None:
    job = await producer.submit(model="sim", messages=HI)
    await redis.delete(f"arq:job:{job.id}")
    await redis.hset(f"deltafan:{{{job.id}}}:state", mapping={"status": "running", "run": "another", "claim": 99})  # type: ignore[misc]
    async with running_worker(env) as worker:
        await wait_until(lambda: claimed_times(redis, job.id, 2), "it is looked at again and again")
        assert await redis.zscore("deltafan:queue:interactive", job.id)
        await redis.hset(f"deltafan:{{{job.id}}}:state", "claim", "0")  # type: ignore[misc]
        with pytest.raises(JobFailed, match="not_run"):
            await consumer.result(job.id, timeout=10)
        await wait_until(lambda: not worker.tasks, "the queue is told")
    assert not await redis.zcard("deltafan:queue:interactive")


async def test_a_claim_and_the_record_of_its_job_are_one_servers(
    producer: Producer, consumer: Consumer, redis: Redis, env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a replica takes over, the next command may reach the old server, where the job has ended long ago."""

    async def forgetting(pool: Any, called: Any, *args: Any, **options: Any) -> Any:
        reply = await run_script(pool, called, *args, **options)
        if called.name == "claim":
            await redis.delete(f"arq:job:{job.id}")
        return reply

    monkeypatch.setattr(_leased, "run_script", forgetting)
    job = await producer.submit(model="sim", messages=HI)
    async with running_worker(env):
        assert (await consumer.result(job.id, timeout=10)).content == "Hello, world!"


async def test_large_jobs_are_claimed_in_portions(
    producer: Producer, redis_url: str, upstream: ScriptedUpstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    async def noting(pool: Any, called: Any, *args: Any, **options: Any) -> Any:
        reply = await run_script(pool, called, *args, **options)
        if called.name == "claim":
            sizes.append(sum(len(record) for record in reply[1][5::7]))
        return reply

    monkeypatch.setattr(_leased, "run_script", noting)
    large = [{"role": "user", "content": "x" * 600_000}]
    jobs = await producer.submit_many([{"model": "sim", "messages": large}] * 5)
    async with running_worker(settings_env(redis_url, upstream.url, tmp_path)):
        await wait_until(lambda: len(upstream.requests) == len(jobs), "all run")
    assert 1_200_000 < max(sizes) < 1_300_000


async def claimed_times(redis: Redis, job_id: str, count: int) -> bool:
    return int(await redis.get(f"arq:retry:{job_id}") or 0) >= count


async def test_a_job_that_is_stopped_before_it_starts_again_leaves_its_last_run_alone(
    worker: LeasedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, first, second = asyncio.Event(), a_claim(1), a_claim(2)

    async def run_job(job_id: str, _score: int) -> None:
        worker.job_tasks[job_id] = asyncio.create_task(gate.wait(), name="function")
        await worker.job_tasks[job_id]
        del worker.job_tasks[job_id]

    monkeypatch.setattr(worker, "run_job", run_job)
    worker._launch(first)
    await wait_until(lambda: worker.job_tasks, "it runs")
    first.renewed = False
    worker._launch(second)
    function = worker.job_tasks["j"]
    worker._stop(second, Reason.HAND_OVER)
    gate.set()
    await wait_until(lambda: not worker.tasks, "both are over")
    assert not function.cancelled()


@pytest.mark.parametrize("frees_its_slot", ["during the outage", "afterwards"])
async def test_after_an_outage_a_full_worker_leaves_running_jobs_to_their_workers(
    frees_its_slot: str,
    producer: Producer,
    consumer: Consumer,
    redis: Redis,
    valkey: Valkey,
    upstream: ScriptedUpstream,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_leased, "BEAT_S", 0.1)
    gates = [asyncio.Event(), asyncio.Event()]
    for gate in gates:
        upstream.then([script.delta(content="Hello"), gate, *script.ending()])
    async with tcp_proxy(valkey.port) as ours, tcp_proxy(valkey.port) as theirs:

        def worker(queue: TcpProxy) -> AbstractAsyncContextManager[LeasedWorker]:
            options = {"streams_url": valkey.url, "lease_s": 2, "concurrency": 1}
            return running_worker(settings_env(queue.url, upstream.url, tmp_path, **options))

        async with worker(ours) as our_worker, worker(theirs):
            jobs = []
            for count in (1, 2):
                jobs.append(await producer.submit(model="sim", messages=HI))
                await wait_until(lambda count=count: len(upstream.requests) == count, "it runs")  # type: ignore[misc]
            if jobs[0].id not in our_worker.claims:
                jobs, gates = jobs[::-1], gates[::-1]
            for queue in (ours, theirs):
                queue.refuses = True
                queue.cut()
            if frees_its_slot == "during the outage":
                gates[0].set()
            await wait_until(partial(has_no_lease, redis, jobs[1].id), "the leases have run out")
            ours.refuses = False
            if frees_its_slot == "afterwards":
                await wait_until(partial(redis.exists, f"arq:in-progress:{jobs[0].id}"), "ours is renewed")
                gates[0].set()
            await wait_until(partial(is_put_off, redis, jobs[1].id), "their job has been looked at")
            theirs.refuses = False
            await wait_until(partial(redis.exists, f"arq:in-progress:{jobs[1].id}"), "and is theirs again")
            gates[1].set()
            assert (await consumer.result(jobs[1].id, timeout=10)).attempt_no == 1
    assert len(upstream.requests) == 2


async def has_no_lease(redis: Redis, job_id: str) -> bool:
    return not await redis.exists(f"arq:in-progress:{job_id}")


async def lease_end_ms(redis: Redis, job_id: str) -> float:
    left_ms = int(await redis.pttl(f"arq:in-progress:{job_id}"))
    return time.time() * 1000 + left_ms if left_ms > 0 else 0.0


async def is_put_off(redis: Redis, job_id: str) -> bool:
    score = await redis.zscore("deltafan:queue:interactive", job_id)
    return bool(score and score > time.time() * 1000)


async def test_however_many_slots_are_free_few_jobs_begin_at_once(
    producer: Producer, redis_url: str, upstream: ScriptedUpstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else an urgent one, or the heartbeat, stands in line behind the first steps of all of them."""
    claimed: list[int] = []

    async def noting(pool: Any, called: Any, *args: Any, **options: Any) -> Any:
        reply = await run_script(pool, called, *args, **options)
        if called.name == "claim":
            claimed.append(len(reply[1]) // 7)
        return reply

    monkeypatch.setattr(_leased, "run_script", noting)
    await producer.submit_many([{"model": "sim", "messages": HI}] * (5 * CLAIMED_AT_ONCE))
    async with running_worker(settings_env(redis_url, upstream.url, tmp_path, concurrency=1000)):
        await wait_until(lambda: sum(claimed) == 5 * CLAIMED_AT_ONCE, "all are claimed")
    assert max(claimed) == CLAIMED_AT_ONCE


async def test_jobs_that_came_together_are_not_asked_for_one_by_one(
    producer: Producer, consumer: Consumer, worker: LeasedWorker, redis: Redis, upstream: ScriptedUpstream
) -> None:
    upstream.standing = script.text("Hi")
    job = await producer.submit(model="sim", messages=HI)
    await consumer.result(job.id, timeout=10)
    await redis.config_resetstat()
    jobs = await producer.submit_many([{"model": "sim", "messages": HI}] * (5 * CLAIMED_AT_ONCE))
    await asyncio.gather(*[consumer.result(job.id, timeout=20) for job in jobs])

    async def is_silent() -> bool:
        return not await redis.exists(f"{QUEUE}:bell")

    await wait_until(is_silent, "all rings are taken")
    stats = await redis.info("commandstats")
    assert stats["cmdstat_blpop"]["calls"] < CLAIMED_AT_ONCE, "each job has rung"
    assert worker.jobs_complete >= 5 * CLAIMED_AT_ONCE


@pytest.mark.parametrize("others", [1, CLAIMED_AT_ONCE, CLAIMED_AT_ONCE + 1])
async def test_a_job_that_is_due_soon_is_not_overslept_when_others_have_been_claimed(
    others: int,
    producer: Producer,
    consumer: Consumer,
    env: dict[str, str],
    redis: Redis,
    upstream: ScriptedUpstream,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_leased, "POLL_S", 60.0)
    upstream.standing = script.text("Hi")
    async with running_worker(env) as worker:
        await producer.submit(model="sim", messages=HI)
        await wait_until(lambda: worker.jobs_complete == 1, "it is awake, and knows of nothing else")
        enqueue = partial(worker.pool.enqueue_job, FUNCTION, model="sim", messages=HI, _queue_name=QUEUE)
        deferred = await enqueue(_defer_by=0.5)  # stock arq does not ring
        assert deferred is not None
        for _ in range(others):
            await enqueue()
        await redis.execute_command("LPUSH", f"{QUEUE}:bell", 1)
        assert (await consumer.result(deferred.job_id, timeout=10)).content == "Hi"


async def test_a_server_that_refuses_to_give_jobs_out_is_asked_now_and_then(
    producer: Producer, consumer: Consumer, redis: Redis, env: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    job = await producer.submit(model="sim", messages=HI)
    try:
        await redis.config_set("maxmemory", "1")
        async with running_worker(env):
            await wait_until(lambda: "refuses to give jobs out" in caplog.text, "it is said")
            before = (await redis.info("commandstats"))["cmdstat_ping"]["calls"]

            async def asked_again() -> bool:
                return bool((await redis.info("commandstats"))["cmdstat_ping"]["calls"] > before + 4)

            await wait_until(asked_again, "it goes on asking")
            await redis.config_set("maxmemory", "0")
            await consumer.result(job.id, timeout=10)
            await wait_until(lambda: "is back" in caplog.text, "that is said too")
    finally:
        await redis.config_set("maxmemory", "0")
    said = [record.message for record in caplog.records if "the queue's Redis" in record.message]
    assert len(said) == 2, said


async def test_a_server_without_memory_does_not_cost_the_leases(
    producer: Producer, redis: Redis, redis_url: str, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    gate = asyncio.Event()
    upstream.then([script.delta(content="Hello"), gate, *script.ending()])
    async with running_worker(settings_env(redis_url, upstream.url, tmp_path, lease_s=2)):
        job = await producer.submit(model="sim", messages=HI)
        await wait_until(lambda: upstream.requests, "it runs")
        try:
            await redis.config_set("maxmemory", "1")
            end_ms = await lease_end_ms(redis, job.id)

            async def is_renewed() -> bool:
                return await lease_end_ms(redis, job.id) > end_ms + 1000

            await wait_until(is_renewed, "it is renewed again and again")
            score = await redis.zscore("deltafan:queue:interactive", job.id)
            assert int(score or 0) > end_ms + 900, "and its turn put off"
        finally:
            await redis.config_set("maxmemory", "0")
            gate.set()


async def test_a_server_that_falls_silent_does_not_keep_a_worker_from_stopping(
    valkey: Valkey, redis: Redis, upstream: ScriptedUpstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asyncio.Event()

    async def noticed(pool: Any, script: Any, *args: Any, **options: Any) -> Any:
        asked.set()
        return await run_script(pool, script, *args, **options)

    monkeypatch.setattr(_leased, "run_script", noticed)
    async with tcp_proxy(valkey.port) as proxy:
        env = settings_env(proxy.url, upstream.url, tmp_path, streams_url=valkey.url)
        async with open_worker(load_settings(env), env) as worker:
            await worker.pool.ping()
            proxy.pause()
            async with background(worker.main(), "worker") as main:
                await asked.wait()
                worker.drain()
                done, _ = await asyncio.wait([main], timeout=3)
                proxy.cut()
                proxy.resume()
                assert done


async def test_what_a_claim_under_way_brings_when_the_worker_is_stopped_is_run(
    producer: Producer, consumer: Consumer, env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_worker(load_settings(env), env) as worker:

        async def slow(pool: Any, script: Any, *args: Any, **options: Any) -> Any:
            reply = await run_script(pool, script, *args, **options)
            if script.name == "claim" and reply[1]:
                worker.drain()
                await pool.ping()
            return reply

        monkeypatch.setattr(_leased, "run_script", slow)
        job = await producer.submit(model="sim", messages=HI)
        await asyncio.wait_for(worker.main(), 10)
        assert (await consumer.result(job.id, timeout=0.1)).content == "Hello, world!"


@pytest.mark.parametrize("reason", [Reason.ABORTED, Reason.HAND_OVER])
async def test_a_job_that_has_not_started_yet_can_be_interrupted(
    reason: Reason,
    producer: Producer,
    consumer: Consumer,
    worker: LeasedWorker,
    upstream: ScriptedUpstream,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launch, launched = LeasedWorker._launch, 0

    def launch_and_interrupt(self: LeasedWorker, claim: Claim) -> None:
        nonlocal launched
        launched += 1
        launch(self, claim)
        if launched == 1:
            self._interrupt(claim, reason)

    monkeypatch.setattr(LeasedWorker, "_launch", launch_and_interrupt)
    job = await producer.submit(model="sim", messages=HI)
    if reason is Reason.ABORTED:
        with pytest.raises(JobCancelled):
            await consumer.result(job.id, timeout=10)
    else:
        assert (await consumer.result(job.id, timeout=10)).attempt_no == 1
    assert len(upstream.requests) == (0 if reason is Reason.ABORTED else 1)


async def test_the_answer_for_a_lease_that_was_taken_anew_meanwhile_is_no_answer_for_that(
    worker: LeasedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = a_claim(1)

    async def taken_meanwhile(_pool: Any, script: Any, *_: Any, **_options: Any) -> Any:
        if script.name != "beat":
            return [-1, [], [0, 0], 0, 0]
        claim.token = "me:2"
        return [b"L"]

    monkeypatch.setattr(_leased, "run_script", taken_meanwhile)
    monkeypatch.setitem(worker.claims, "j", claim)
    await worker._beat()
    assert claim.renewed
    await worker._beat()
    assert not claim.renewed


async def test_an_abort_whose_notice_was_lost_is_noticed_again(
    producer: Producer, consumer: Consumer, redis: Redis, worker: LeasedWorker, upstream: ScriptedUpstream
) -> None:
    heed, heard = worker._heed, []

    def deaf_once(claim: Claim, answer: bytes) -> None:
        heard.append(answer)
        if heard.count(b"A") != 1:
            heed(claim, answer)

    worker._heed = deaf_once  # type: ignore[method-assign]
    upstream.then([script.delta(content="Hello, "), asyncio.Event()])
    job = await producer.submit(model="sim", messages=HI)
    await wait_until(lambda: upstream.requests, "it runs")
    await redis.zadd("arq:abort", {job.id: 1})
    with pytest.raises(JobCancelled):
        await consumer.result(job.id, timeout=10)
    await wait_until(lambda: not worker.tasks, "the queue is told")
    assert await redis.zcard("arq:abort") == 0


async def test_the_abort_of_a_waiting_job_outlives_the_worker_that_has_claimed_it(
    producer: Producer, consumer: Consumer, redis: Redis, redis_url: str, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    env = settings_env(redis_url, upstream.url, tmp_path, lease_s=2)
    job = await producer.submit(model="sim", messages=HI)
    await redis.zadd("arq:abort", {job.id: 1})
    with worker_process(env, at="before:begin") as process:
        assert await asyncio.to_thread(process.wait, 20) == -signal.SIGKILL
    async with running_worker(env):
        with pytest.raises(JobCancelled, match="aborted"):
            await consumer.result(job.id, timeout=10)
        await wait_until(partial(redis.exists, f"arq:result:{job.id}"), "the queue is told")
    assert not upstream.requests
    assert await redis.zcard("arq:abort") == 0


async def test_a_job_that_is_aborted_while_it_steps_back_does_not_wait_for_room(
    producer: Producer,
    consumer: Consumer,
    redis: Redis,
    worker: LeasedWorker,
    upstream: ScriptedUpstream,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rest = StreamWriter.rest

    async def aborted_meanwhile(writer: StreamWriter) -> Any:
        await redis.zadd("arq:abort", {writer.job_id: 1})
        await wait_until(lambda: worker.aborting_tasks, "the heartbeat has seen the abort")
        return await rest(writer)

    monkeypatch.setattr(StreamWriter, "rest", aborted_meanwhile)
    gate = asyncio.Event()
    upstream.then([script.delta(content="It has all the room."), gate, *script.ending()])
    await producer.submit(model="one", messages=HI)
    await wait_until(lambda: upstream.requests, "it runs")
    await redis.set("arq:retry:late", 1, px=60_000)  # a worker that died has claimed it before
    await producer.submit(model="one", messages=HI, job_id="late")
    with pytest.raises(JobCancelled):
        await consumer.result("late", timeout=10)
    gate.set()
