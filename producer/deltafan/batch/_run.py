"""Running a batch: a bounded window of jobs in flight, and their outcomes as they come."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice

from deltafan import (
    Consumer,
    Failure,
    Generation,
    JobEnded,
    JobNotFound,
    Producer,
    RedisUnavailable,
    ResultTimeout,
    StreamExpired,
)
from deltafan.batch._files import job_id_of
from deltafan.batch._outcome import Outcome
from deltafan.batch._rows import Row

PORTION = 100
"""Jobs per submit; the window is refilled by so many at a time."""
_LOOK_S = 60.0
"""How long one question for a result waits before it is asked anew."""
_PAUSE_S = 0.5


class Batch:
    """Runs rows through the batch lane. One instance for one run."""

    def __init__(
        self,
        producer: Producer,
        consumer: Consumer,
        *,
        batch_id: str,
        window: int = 2000,
        tenant: str | None = None,
        job_id: Callable[[Row], str] | None = None,
    ) -> None:
        self._producer = producer
        self._consumer = consumer
        self._batch_id = batch_id
        self._window = window
        self._tenant = tenant or batch_id
        self._job_id = job_id or (lambda row: job_id_of(batch_id, row.custom_id, 0))
        self._stopping = asyncio.Event()
        self._waiting: set[asyncio.Task[Outcome]] = set()
        self.cancelled = False
        self.in_flight: dict[str, Row] = {}
        """Jobs that were submitted and whose outcome nobody has taken yet."""

    def stop(self) -> None:
        """Submit nothing more; what is in flight comes to its end."""
        self._stopping.set()

    async def cancel(self) -> None:
        """Stop, and cancel what is in flight."""
        self.stop()
        self.cancelled = True
        for job_id in tuple(self.in_flight):
            with suppress(JobNotFound, RedisUnavailable):
                await self._producer.cancel(job_id, reason="the batch was cancelled")

    async def run(self, rows: Iterable[Row], *, ordered: bool = False) -> AsyncGenerator[Outcome, None]:
        """Outcomes as they come or, if `ordered`, as the rows go. Leaving it early leaves jobs in flight to the fleet.

        No more than the window is submitted and not yet taken, so a slow taker slows the batch, and memory is bounded.
        """
        pending = iter(rows)
        room = asyncio.Semaphore(self._window)
        done: asyncio.Queue[asyncio.Task[Outcome] | None] = asyncio.Queue()
        async with asyncio.TaskGroup() as tasks:
            feeder = tasks.create_task(self._feed(tasks, pending, room, done, ordered=ordered))
            try:
                while (task := await done.get()) is not None:
                    outcome = await task
                    self.in_flight.pop(outcome.job_id, None)
                    room.release()
                    yield outcome
            finally:
                feeder.cancel()
                for waiting in tuple(self._waiting):
                    waiting.cancel()

    async def _feed(
        self,
        tasks: asyncio.TaskGroup,
        pending: Iterator[Row],
        room: asyncio.Semaphore,
        done: "asyncio.Queue[asyncio.Task[Outcome] | None]",
        *,
        ordered: bool,
    ) -> None:
        def ended(task: "asyncio.Task[Outcome]") -> None:
            self._waiting.discard(task)
            if not ordered and not task.cancelled():
                done.put_nowait(task)

        while not self._stopping.is_set() and (portion := list(islice(pending, min(PORTION, self._window)))):
            for _ in portion:
                await room.acquire()
            if self._stopping.is_set():
                break
            jobs = await self._submit(portion)
            for job_id, row in jobs:
                self.in_flight[job_id] = row
                task = tasks.create_task(self._outcome(job_id, row))
                self._waiting.add(task)
                task.add_done_callback(ended)
                if ordered:
                    done.put_nowait(task)
        while self._waiting:
            await asyncio.wait(self._waiting)
        done.put_nowait(None)

    async def _submit(self, portion: list[Row]) -> list[tuple[str, Row]]:
        requests = [
            {
                "model": row.model,
                "api": row.api,
                "body": row.body,
                "job_id": self._job_id(row),
                "lane": "batch",
                "tenant": self._tenant,
                "metadata": {"batch": self._batch_id, "custom_id": row.custom_id},
            }
            for row in portion
        ]
        while True:
            try:
                jobs = await self._producer.submit_many(requests)
            except RedisUnavailable:
                await asyncio.sleep(_PAUSE_S)
            else:
                return [(job.id, row) for job, row in zip(jobs, portion, strict=True)]

    async def _outcome(self, job_id: str, row: Row) -> Outcome:
        started = time.monotonic()
        while True:
            try:
                generation = await self._consumer.result(job_id, timeout=_LOOK_S)
            except JobEnded as error:
                generation = error.generation
            except (ResultTimeout, RedisUnavailable):
                continue
            except JobNotFound:  # the server has forgotten it
                with suppress(RedisUnavailable):
                    await self._submit([row])
                await asyncio.sleep(_PAUSE_S)
                continue
            except StreamExpired:
                why = Failure("result_expired", "its result was not fetched in time; run it again", retryable=True)
                generation = Generation(status="failed", failure=why)
            return Outcome(row, job_id, generation, time.monotonic() - started)
