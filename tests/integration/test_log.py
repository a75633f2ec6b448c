"""The log of one job, its scripts on a real server, against a plain list.

Several writers compete for the job: each begins, appends, is fenced, re-sends, heals, finishes; keys are lost, the end
comes once, and readers resume anywhere. The model is a list of entries and a few facts.
"""

import asyncio
from pathlib import Path
from typing import Any

import orjson
import pytest
import redis as sync_redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis.asyncio import Redis

from deltafan import Consumer, Position, Producer
from deltafan._follow import Follower
from deltafan._keys import Keys
from deltafan._lua import load
from deltafan.testing import scripted_upstream
from support.valkey import Valkey
from support.waiting import wait_until
from support.workers import running_worker, settings_env

KEYS = Keys()
LIVE, TTLS = 600_000, (100_000, 200_000, 300_000)
TERMINAL = ("completed", "failed", "cancelled")


class Writer:
    """One claimant, and what it believes."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.run = ""
        self.attempt = 0
        self.sent = 0
        self.open = False
        self.flowing = False
        """A refusal stops the appends until a compare, and so does the end."""


class LogMachine(RuleBasedStateMachine):
    """See the module's docstring."""

    url = ""

    @initialize()
    def submit(self) -> None:
        self.redis: Any = sync_redis.Redis.from_url(self.url)  # its types mix both worlds
        self.redis.flushall()
        self.keys = KEYS.job("j")
        self.model: list[tuple[Position, str]] = []
        self.seen_attempts: set[int] = set()
        self.writers: list[Writer] = []
        self.owner: Writer | None = None
        self.ended = False
        self.cancelled = False
        self.damaged = False
        self.runs = 0
        args = (LIVE, "", "", "", 0, 0, "digest", "")
        assert self.script("submit", args, package="deltafan", using=("common", "enqueue")) == [[b"NEW", b"queued"]]

    def teardown(self) -> None:
        if hasattr(self, "redis"):
            self.redis.close()

    def script(
        self,
        name: str,
        args: tuple[Any, ...],
        *,
        package: str = "deltafan_worker",
        using: tuple[str, ...] = ("common",),
    ) -> Any:
        script = load(name, package, using=using)
        return self.redis.eval(script.source.decode(), 3, *self.keys, *args)

    def begin(self, writer: Writer, mode: str, origin: str = "") -> Any:
        run = f"run-{len(self.seen_attempts)}-{writer.number}-{len(self.model)}"
        args = (
            run,
            writer.run,
            writer.number,
            writer.attempt,
            mode,
            1000,
            LIVE,
            '"model":"m"',
            f"c{run}",
            '"x":1',
            "",
            "",
        )
        reply = self.script("begin", (*args, *TTLS, "restart", origin))
        if reply[0] == b"RUN":
            attempt = int(reply[1])
            assert attempt not in self.seen_attempts, "an attempt's number is issued once"
            assert attempt > max(self.seen_attempts, default=0)
            self.seen_attempts.add(attempt)
            writer.run, writer.attempt, writer.sent, writer.open, writer.flowing = run, attempt, 0, True, True
            self.model.append((Position(attempt, 0), "started"))
            self.owner, self.damaged = writer, False
        return reply

    @rule()
    @precondition(lambda self: len(self.writers) < 4)
    def claim(self) -> None:
        writer = Writer(len(self.writers) + 1)
        self.writers.append(writer)
        reply = self.begin(writer, "claim")
        if self.ended or self.cancelled:
            assert reply[0] == b"ENDED"
            self.close_by_other("cancelled")
        else:
            assert reply[0] == b"RUN"

    @rule(stale=st.booleans())
    @precondition(lambda self: len(self.writers) < 6 and self.model)
    def go_on(self, *, stale: bool) -> None:
        """A claim that goes on from what it has read: from the last entry, or from one that no longer is."""
        origin = self.model[-2 if stale and len(self.model) > 1 else -1][0]
        writer = Writer(len(self.writers) + 1)
        self.writers.append(writer)
        reply = self.begin(writer, "claim", str(origin))
        if self.ended or self.cancelled:
            assert reply[0] == b"ENDED"
            self.close_by_other("cancelled")
        elif reply[0] == b"RUN":
            assert reply[3] == b"continue"
            before = [position for position, _ in self.model[:-1]]
            assert before[-1] == origin, "it goes on from the last entry"
            attempt = [position.seq for position in before if position.attempt == origin.attempt]
            assert attempt == list(range(origin.seq + 1)), "and no hole lies before it"
        else:
            assert reply[0] == b"MOVED"
            assert stale or self.damaged
            writer.open = False

    def close_by_other(self, kind: str) -> None:
        if not self.ended:
            self.ended = True
            attempt = int(self.redis.hget(self.keys[1], "attempt") or 0)
            assert attempt > max(self.seen_attempts, default=0), (
                "whoever ends a job he does not run opens a new attempt"
            )
            self.seen_attempts.add(attempt)
            self.model.append((Position(attempt, 0), kind))

    @rule(data=st.data(), count=st.integers(1, 4))
    @precondition(lambda self: any(writer.flowing for writer in self.writers))
    def append(self, data: st.DataObject, count: int) -> None:
        writer = data.draw(st.sampled_from([w for w in self.writers if w.flowing]))
        for _ in range(count):
            writer.sent += 1
            position = Position(writer.attempt, writer.sent)
            accepted = self.xadd(position)
            expected = writer is self.owner and not self.ended and not self.damaged
            if expected:
                assert accepted
            if accepted:
                assert not self.ended, "nothing stands behind the terminal entry"
                assert not self.model or self.model[-1][0] < position
                self.model.append((position, "content"))
            else:
                writer.flowing = False
                return

    def xadd(self, position: Position) -> bool:
        try:
            reply = self.redis.xadd(self.keys[0], {"type": "content", "data": "x"}, id=str(position), nomkstream=True)
        except sync_redis.ResponseError as error:
            assert "equal or smaller" in str(error)
            return False
        return reply is not None

    @rule(data=st.data())
    @precondition(lambda self: any(writer.open and writer.sent for writer in self.writers))
    def send_again(self, data: st.DataObject) -> None:
        writer = data.draw(st.sampled_from([w for w in self.writers if w.open and w.sent]))
        position = Position(writer.attempt, data.draw(st.integers(1, writer.sent)))
        if any(known == position for known, _ in self.model):
            assert not self.xadd(position), "a duplicate is refused"

    @rule(data=st.data())
    @precondition(lambda self: any(writer.open for writer in self.writers))
    def compare(self, data: st.DataObject) -> None:
        writer = data.draw(st.sampled_from([w for w in self.writers if w.open]))
        reply = self.script("compare", (writer.run, writer.attempt, writer.number, writer.sent, LIVE, *TTLS))
        if self.ended:
            assert reply[0] == b"ENDED"
        elif writer is not self.owner and not self.damaged:
            assert reply[0] == b"FENCED"
        writer.flowing = reply[0] in (b"OK", b"HEAL")
        if reply[0] == b"HEAL":
            for seq in range(reply[2] + 1, writer.sent + 1):
                assert self.xadd(Position(writer.attempt, seq))
                self.model.append((Position(writer.attempt, seq), "content"))
        elif reply[0] == b"REPLAY":
            sent = writer.sent
            if self.begin(writer, "replay")[0] == b"RUN":
                for seq in range(1, sent + 1):
                    assert self.xadd(Position(writer.attempt, seq))
                    self.model.append((Position(writer.attempt, seq), "content"))
                writer.sent = sent
        elif reply[0] in (b"FENCED", b"ENDED"):
            writer.open = writer.flowing = False

    @rule(data=st.data())
    @precondition(lambda self: any(writer.open for writer in self.writers))
    def finish(self, data: st.DataObject) -> None:
        writer = data.draw(st.sampled_from([w for w in self.writers if w.open]))
        args = (writer.run, writer.attempt, writer.sent + 1, "completed", "{}", "{}", "call", "{}")
        reply = self.script("finish", (*args, *TTLS))
        if reply[0] == b"OK":
            assert writer is self.owner
            assert not self.ended
            assert not self.cancelled, "an acknowledged cancel wins"
            position = Position(writer.attempt, writer.sent + 1)
            assert self.model[-1][0] == Position(writer.attempt, writer.sent), "it stands right behind what it sealed"
            assert [p.seq for p, _ in self.model if p.attempt == writer.attempt] == list(range(writer.sent + 1)), (
                "no hole"
            )
            self.model.append((position, "completed"))
            self.ended, writer.flowing = True, False
        elif self.ended:
            assert reply[0] in (b"ALREADY", b"ENDED")
        elif self.cancelled and writer is self.owner:
            assert reply[0] in (b"CANCEL", b"CHECK")
        else:
            assert reply[0] == b"CHECK"

    @rule()
    def cancel(self) -> None:
        reply = self.script("cancel", ("why", LIVE, *TTLS), package="deltafan")
        if self.ended:
            assert reply[0] == b"ENDED"
        elif reply[0] == b"CANCELLED":
            assert not self.seen_attempts
            self.close_by_other("cancelled")
        elif reply[0] == b"REQUESTED":
            self.cancelled = True

    @rule(which=st.sampled_from(["all", "suffix", "last", "middle"]))
    @precondition(lambda self: self.model and not self.ended)
    def lose(self, which: str) -> None:
        """The key is deleted; a failover forgets a suffix; entries are deleted at the end or in the middle."""
        self.damaged = True
        if which == "all":
            self.redis.delete(self.keys[0])
            self.model.clear()
        elif which == "suffix":
            del self.model[(len(self.model) + 1) // 2 :]
            self.redis.delete(self.keys[0])
            for position, kind in self.model:
                self.redis.xadd(self.keys[0], {"type": kind, "data": "x"}, id=str(position))
            self.redis.pexpire(self.keys[0], LIVE)
        else:
            index = len(self.model) - 1 if which == "last" else len(self.model) // 2
            self.redis.xdel(self.keys[0], str(self.model[index][0]))
            del self.model[index]

    @invariant()
    def the_stream_is_the_list(self) -> None:
        if not hasattr(self, "model"):
            return
        entries = self.redis.xrange(self.keys[0])
        found = [(Position.parse(entry_id), fields[b"type"].decode()) for entry_id, fields in entries]
        assert found == self.model
        assert sum(kind in TERMINAL for _, kind in found) <= 1
        assert all(self.redis.ttl(key) > 0 for key in self.redis.keys("*"))

    @invariant()
    def readers_resume_anywhere(self) -> None:
        if not hasattr(self, "model"):
            return
        raw = [
            (
                str(position).encode(),
                [b"type", kind.encode(), b"data", b'{"mode":"restart"}' if kind == "started" else b"x"],
            )
            for position, kind in self.model
        ]
        whole = [event.position for event in Follower().take(raw)]
        assert whole == sorted(set(whole))
        for index, position in enumerate(whole):
            later = [entry for entry in raw if Position.parse(entry[0]) > position]
            assert [event.position for event in Follower(position).take(later)] == whole[index + 1 :]


def test_the_log_against_a_plain_list(valkey: Valkey) -> None:
    class Machine(LogMachine):
        url = valkey.url

    limits = settings(
        max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    run_state_machine_as_test(Machine, settings=limits)


@pytest.mark.parametrize("billed", [False, True], ids=["before the ledger", "after the ledger"])
async def test_a_job_that_ended_is_only_closed_by_its_next_claimant(
    billed: bool, producer: Producer, consumer: Consumer, redis: Redis, redis_url: str, tmp_path: Path
) -> None:
    """The worker died behind `finish`: the job has ended, and arq knows nothing of it."""
    job = await producer.submit(model="sim", messages=[{"role": "user", "content": "Hi"}])
    async with scripted_upstream() as upstream:
        env = settings_env(redis_url, upstream.url, tmp_path)
        record = await redis.get(f"arq:job:{job.id}")
        async with running_worker(env):
            result = await consumer.result(job.id, timeout=10)
            await wait_until(lambda: redis.exists(f"arq:result:{job.id}"), "the job is closed")
        await redis.delete(f"arq:result:{job.id}")
        if not billed:
            await redis.delete("deltafan:usage", f"deltafan:billed:{job.id}")
        await redis.set(f"arq:job:{job.id}", record or b"", ex=600)
        await redis.zadd("deltafan:queue:interactive", {job.id: 1})
        before = await redis.xrange(f"deltafan:{{{job.id}}}:events")
        async with running_worker(env):
            await wait_until(lambda: redis.exists(f"arq:result:{job.id}"), "the job is closed again")
        assert await redis.xrange(f"deltafan:{{{job.id}}}:events") == before
        assert len(upstream.requests) == 1
        ((_, fields),) = await redis.xrange("deltafan:usage")
        assert result.usage is not None
        assert orjson.loads(fields[b"data"]) == result.usage.to_json()


async def test_submits_at_the_same_moment_make_one_job(producer: Producer, redis: Redis) -> None:
    jobs = await asyncio.gather(
        *[producer.submit(model="m", messages=[{"role": "user"}], job_id="j") for _ in range(20)]
    )
    assert sum(job.created for job in jobs) == 1
    assert await redis.zcard("deltafan:queue:interactive") == 1


@pytest.mark.parametrize("status", ["completed", "cancelled"])
async def test_an_evicted_state_does_not_bring_an_ended_job_back(producer: Producer, redis: Redis, status: str) -> None:
    await redis.xadd("deltafan:{j}:events", {"type": status, "data": "{}"}, id="5-0")
    await redis.expire("deltafan:{j}:events", 600)
    job = await producer.submit(model="m", messages=[{"role": "user"}], job_id="j")
    assert (job.created, job.status) == (False, status)
    assert not await redis.exists("arq:job:j")
