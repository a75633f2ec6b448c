"""The load of a scenario: jobs at an even rate, their readers, and those who ask for their end."""

import asyncio
import random
from collections.abc import Sequence

from deltafan import DeltafanError, JobNotFound, Producer, RedisUnavailable
from jobs import Job, draw_job
from readers import Reading, read
from transcripts import Transcript

JOBS_PER_S = 25


class Load:
    """Jobs and what became of them. The same seed gives the same jobs, readers and cancels."""

    def __init__(self, seed: str, producers: Sequence[Producer], reading: Reading, *, forgets: bool) -> None:
        self.jobs: list[Job] = []
        self.transcripts: dict[tuple[Job, str], Transcript | None] = {}
        """By job and kind of reader; None as long as it reads."""
        self.cancels: dict[str, str] = {}
        """By job: `asked` for, or `promised`."""
        self.forgotten: list[str] = []
        """Jobs that the server no longer knew, though it forgets nothing in this scenario."""
        self.errors: list[str] = []
        self._seed = seed
        self._producers = producers
        self._reading = reading
        self._forgets = forgets

    async def run(self, tasks: asyncio.TaskGroup, load_s: float) -> None:
        """Submit jobs, each with its readers."""
        chance = random.Random(f"{self._seed}/load")
        for number in range(int(load_s * JOBS_PER_S)):
            job = draw_job(number, chance)
            self.jobs.append(job)
            self.transcripts |= {(job, kind): None for kind in job.readers}
            tasks.create_task(self._live(tasks, job))
            await asyncio.sleep(1 / JOBS_PER_S)

    @property
    def has_begun(self) -> bool:
        """Whether somebody has read an answer."""
        return any(transcript is not None for transcript in self.transcripts.values())

    async def _submit_again(self, job: Job) -> None:
        """Submit a job that a server said it does not know."""
        if await self._submit(job) and not self._forgets:
            self.forgotten.append(job.id)

    async def _live(self, tasks: asyncio.TaskGroup, job: Job) -> None:
        await self._submit(job)
        for kind in job.readers:
            tasks.create_task(self._read(job, kind))
        if job.cancelled_after_s is not None:
            await asyncio.sleep(job.cancelled_after_s)
            await self._cancel(job)

    async def _submit(self, job: Job) -> bool:
        """As often as it takes, since the same id is the same job; whether the last time has made it known."""
        while True:
            try:
                return (await self._producers[0].submit(**job.request)).created
            except RedisUnavailable:
                await asyncio.sleep(0.1)

    async def _cancel(self, job: Job) -> None:
        """From one machine or another, every third time twice."""
        for _ in range(1 + (job.number % 3 == 0)):
            self.cancels.setdefault(job.id, "asked")
            try:
                outcome = await self._producers[job.number % 2].cancel(job.id)
            except (RedisUnavailable, JobNotFound):
                await asyncio.sleep(0.1)
                continue
            if outcome != "ended" and not self._forgets:
                self.cancels[job.id] = "promised"

    async def _read(self, job: Job, kind: str) -> None:
        chance = random.Random(f"{self._seed}/{job.id}/{kind}")
        try:
            self.transcripts[job, kind] = await read(job, kind, self._reading, chance, self._submit_again)
        except DeltafanError as error:
            self.errors.append(f"{job.id}, read {kind}: {error!r}")
