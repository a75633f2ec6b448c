"""One scenario: a fleet under load, faults, and an account of every transcript and every bill."""

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import orjson
from redis.asyncio import Redis
from redis.exceptions import RedisError

from deltafan import Consumer, Producer, RedisUnavailable, UsageRecord
from faults import Fault, hurt_quietly
from fleet import Fleet, fleet
from readers import KINDS, Reading, read
from transcripts import Job, Transcript, Verdict, judge

JOBS_PER_S = 25
PATIENCE_S = 45.0
"""So long after the last fault every job has ended, or it hangs."""


@dataclass
class Account:
    """What came out, over any number of scenarios."""

    runs: int = 0
    faults: int = 0
    jobs: int = 0
    transcripts: int = 0
    deltas: int = 0
    verdict: Verdict = field(default_factory=Verdict)
    double_billed: int = 0
    unbilled: int = 0
    worst_silence_s: float = 0.0
    examples: list[str] = field(default_factory=list)

    def add(self, other: "Account") -> None:
        """Count another one in."""
        for name in ("runs", "faults", "jobs", "transcripts", "deltas", "double_billed", "unbilled"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.verdict.add(other.verdict)
        self.worst_silence_s = max(self.worst_silence_s, other.worst_silence_s)
        self.examples += other.examples

    @property
    def is_clean(self) -> bool:
        """Whether nothing is wrong."""
        verdict = self.verdict
        return not any(
            (verdict.lost, verdict.duplicated, verdict.disordered, verdict.wrong, self.double_billed, self.unbilled)
        )


async def run_scenario(
    seed: str, faults: Sequence[Fault], *, load_s: float = 8.0, broken: str | None = None, first_number: int = 0
) -> Account:
    """Hurt a fleet under load for `load_s`, with faults drawn from these; then see what every reader has."""
    chance, account = random.Random(seed), Account(runs=1)
    durability = {
        "persistent": any(fault.persistent for fault in faults),
        "replicated": any(fault.replicated for fault in faults),
    }
    async with fleet(seed, broken=broken, **durability) as made:
        replicas = int(made.spare is not None)
        url = made.env["DELTAFAN_REDIS_URL"]
        async with (
            Producer.connect(url, replicas=replicas) as producer,
            Consumer.connect(url) as first,
            Consumer.connect(url) as second,
            Redis.from_url(url, socket_timeout=3) as redis,
        ):
            load = _Load(made, producer, Reading((first, second), redis, chance, _nobody), account, chance)
            load.reading.again = load.submit
            with suppress(TimeoutError):
                async with asyncio.timeout(load_s + PATIENCE_S), asyncio.TaskGroup() as tasks:
                    tasks.create_task(load.run(tasks, load_s, first_number))
                    tasks.create_task(_hurt(made, faults, chance, load_s, account))
            load.judge()
            await _settle_bills(made, load, forgets=any(fault.forgets for fault in faults))
    account.worst_silence_s = load.reading.longest_silence_s
    return account


async def _nobody(_job: Job) -> None:
    raise AssertionError("replaced before anybody reads")


class _Load:
    """Jobs and their readers."""

    def __init__(
        self, made: Fleet, producer: Producer, reading: Reading, account: Account, chance: random.Random
    ) -> None:
        self.made = made
        self.reading = reading
        self.jobs: list[Job] = []
        self.statuses: dict[str, Transcript] = {}
        self._producer = producer
        self._account = account
        self._chance = chance
        self._transcripts: dict[tuple[str, str], Transcript | None] = {}

    async def run(self, tasks: asyncio.TaskGroup, load_s: float, first_number: int) -> None:
        """Submit jobs at an even rate, each with its readers."""
        for number in range(first_number, first_number + int(load_s * JOBS_PER_S)):
            job = Job(f"job-{number}", number, self._chance.randint(1, 40), self._chance.choice((0, 1, 5, 20, 40)))
            self.jobs.append(job)
            tasks.create_task(self._job(tasks, job))
            await asyncio.sleep(1 / JOBS_PER_S)

    async def _job(self, tasks: asyncio.TaskGroup, job: Job) -> None:
        await self.submit(job)
        self.made.running_jobs[job.id] = None
        for kind in (KINDS[0], self._chance.choice(KINDS[1:])):
            self._transcripts[job.id, kind.__name__] = None
            tasks.create_task(self._read(job, kind))

    async def _read(self, job: Job, kind: object) -> None:
        transcript = await read(job, kind, self.reading)  # type: ignore[arg-type]
        self._transcripts[job.id, kind.__name__] = transcript  # type: ignore[attr-defined]
        self.statuses[job.id] = transcript
        self.made.running_jobs.pop(job.id, None)

    async def submit(self, job: Job) -> None:
        """As often as it takes: the same id is the same job."""
        messages = [{"role": "user", "content": job.prompt}]
        while True:
            try:
                await self._producer.submit(model="sim", messages=messages, job_id=job.id)
            except RedisUnavailable:
                await asyncio.sleep(0.1)
            else:
                return

    def judge(self) -> None:
        """Compare every transcript with the truth."""
        account, by_id = self._account, {job.id: job for job in self.jobs}
        account.jobs, account.transcripts = len(self.jobs), len(self._transcripts)
        account.deltas = sum(by_id[job_id].deltas for job_id, _ in self._transcripts)
        for (job_id, kind), transcript in self._transcripts.items():
            verdict = judge(by_id[job_id], transcript)
            account.verdict.add(verdict)
            if verdict.wrong and len(account.examples) < 5:
                state = "never ended" if transcript is None else f"{transcript.status}, {transcript.deltas[:60]}"
                account.examples.append(f"{job_id} ({by_id[job_id].prompt}), read by {kind}: {verdict}: {state}")


async def _hurt(made: Fleet, faults: Sequence[Fault], chance: random.Random, load_s: float, account: Account) -> None:
    loop = asyncio.get_running_loop()
    end = loop.time() + load_s
    await asyncio.sleep(1.5)
    while loop.time() < end:
        fault = chance.choice(faults)
        await hurt_quietly(fault, made)
        account.faults += fault.name != "nothing"
        pace = 1 if len(faults) == 1 else 0.5  # a mixture has them closer together, so that they meet
        await asyncio.sleep(fault.pause_s * pace * (0.5 + chance.random()))


async def _settle_bills(made: Fleet, load: _Load, *, forgets: bool) -> None:
    """Wait until the queue is told of every job, then compare the ledger with what was begun."""
    records: list[UsageRecord] = []
    with suppress(TimeoutError):
        async with asyncio.timeout(20):
            while True:
                with suppress(RedisError, OSError, RuntimeError):
                    async with made.redis as redis:
                        waiting = await redis.zcard("deltafan:queue:interactive")
                        entries = await redis.xrange("deltafan:usage")
                    records = [UsageRecord.from_json(orjson.loads(fields[b"data"])) for _, fields in entries]
                    if waiting == 0:
                        break
                await asyncio.sleep(0.2)
    account = load._account  # noqa: SLF001  of the same module
    calls = Counter(record.call_id for record in records)
    account.double_billed = sum(count - 1 for count in calls.values())
    if forgets:
        return
    begun = await made.upstream_calls()
    by_job: dict[str, list[UsageRecord]] = {}
    for record in records:
        by_job.setdefault(record.job_id, []).append(record)
    for job in load.jobs:
        if job.id not in load.statuses:
            continue
        mine = by_job.get(job.id, [])
        completed = sum(record.outcome == "completed" for record in mine)
        # A call may be tried several times before its first delta; each that gave deltas has a record of its own.
        if completed != 1 or not 1 <= len({record.call_id for record in mine}) <= begun.get(job.number, 0) + _uncalled(
            mine
        ):
            account.unbilled += completed == 0
            account.double_billed += max(0, completed - 1)
            account.examples.append(f"{job.id}: {begun.get(job.number)} calls, records {[r.outcome for r in mine]}")


def _uncalled(records: Sequence[UsageRecord]) -> int:
    """Attempts whose worker vanished before its request went out, or whose request was refused."""
    return sum(record.source == "none" for record in records)
