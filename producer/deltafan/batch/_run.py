"""Running a batch: a bounded window of jobs in flight, and their outcomes as they come."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable
from contextlib import suppress

from deltafan import (
    Consumer,
    Failure,
    Generation,
    InvalidRequest,
    Job,
    JobConflict,
    JobEnded,
    JobNotFound,
    Producer,
    QueueFull,
    RedisUnavailable,
    ResultTimeout,
    StreamExpired,
)
from deltafan.batch._ids import job_id_of, tries_up_to
from deltafan.batch._outcome import Outcome
from deltafan.batch._rows import Row

PORTION = 100
"""Jobs per submit; the window is refilled by so many at a time."""
_LOOK_S = 60.0
"""How long one question for a result waits before it is asked anew."""
_PAUSE_S = 0.5
_NO_ANSWER = frozenset({"failed", "cancelled", "expired"})
_WITHDRAWN = "its batch has withdrawn it"

Rows = Iterable[Row] | AsyncIterable[Row]
Ends = asyncio.Queue["asyncio.Task[Outcome] | None"]


class Batch:
    """Runs rows through the batch lane. One instance for one run.

    A row's job has an id of its batch, its `custom_id` and the number of its try: run again, an answer that is there is
    taken, and what has failed before this run is tried once more.
    """

    def __init__(
        self,
        producer: Producer,
        consumer: Consumer,
        *,
        batch_id: str,
        window: int | Callable[[], int] = 2000,
        tenant: str | None = None,
        tries: Callable[[Row], int] | None = None,
    ) -> None:
        """`window` is how many rows may be submitted and not yet taken, or says so for each that is to be submitted.

        A window of 0 starts nothing for as long as it is so, and ends the run once nothing is in flight: there is then
        nothing left that could open it again.

        `tries` tells how many tries a row has had in earlier runs, withdrawn ones too, which is the number of its
        next: `Outcome.tries` of its last outcome. From that try on the server is asked, as it is for all by default.
        """
        self._producer = producer
        self._consumer = consumer
        self._batch_id = batch_id
        self._window = window if callable(window) else lambda: window
        self._tenant = tenant or batch_id
        self._tries = tries or (lambda _: 0)
        self._stopping = False
        self._withdraws = False
        self._asked_back: set[str] = set()
        self._untaken, self._taken = 0, asyncio.Event()
        self._arrived: asyncio.Queue[Row | None] = asyncio.Queue(PORTION)
        self.cancelled = False
        self.held_up = ""
        """Why nothing can be submitted at the moment, if it is so."""
        self.in_flight: dict[str, Row] = {}
        """Jobs that were submitted and whose outcome nobody has taken yet."""

    def stop(self) -> None:
        """Submit nothing more; what is in flight comes to its end."""
        self._stopping = True
        self._taken.set()
        if not self._arrived.full():
            self._arrived.put_nowait(None)  # who waits for a row wakes up

    async def cancel(self) -> None:
        """Stop, and cancel what is in flight."""
        self.stop()
        self.cancelled = True
        for job_id in tuple(self.in_flight):
            with suppress(JobNotFound, RedisUnavailable):
                await self._producer.cancel(job_id, reason="the batch was cancelled")

    async def withdraw(self) -> None:
        """Stop, and take back what no worker has begun: it costs nothing, has no outcome, and waits for a later run.

        What could not be taken back because Redis was away is asked for again when this is called again.
        """
        self.stop()
        self._withdraws = True
        asked = self.in_flight.keys() - self._asked_back
        with suppress(RedisUnavailable):
            await self._producer.cancel_waiting(asked, reason=_WITHDRAWN)
            self._asked_back |= asked

    async def run(self, rows: Rows, *, ordered: bool = False) -> AsyncGenerator[Outcome, None]:
        """Outcomes as they come or, if `ordered`, as the rows go. Leaving it early leaves jobs in flight to the fleet.

        No more than the window is submitted and not yet taken, so a slow taker slows the batch, and memory is bounded.
        While Redis is away or the lane is full it waits.

        Raises:
            InvalidRequest: a row can not be submitted as it is; the rows before it were.
        """
        ends = Ends()
        driver = asyncio.create_task(self._drive(rows, ends, ordered=ordered), name="batch")
        try:
            while (task := await ends.get()) is not None:
                await asyncio.wait([task])
                if task.cancelled() or task.exception() is not None:
                    continue  # the driver raises what it was
                outcome = task.result()
                self.in_flight.pop(outcome.job_id, None)
                if not _is_withdrawn(outcome.generation):
                    yield outcome
                self._untaken -= 1  # not before: the window may depend on what the taker has made of it
                self._taken.set()
            await driver
        finally:
            driver.cancel()
            await asyncio.gather(driver, return_exceptions=True)

    async def _drive(self, rows: Rows, ends: Ends, *, ordered: bool) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                reading = tasks.create_task(_read(rows, self._arrived))
                async for job_id, row in self._submitted():
                    task = tasks.create_task(self._outcome(job_id, row))
                    if ordered:
                        ends.put_nowait(task)
                    else:
                        task.add_done_callback(ends.put_nowait)
                reading.cancel()
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            ends.put_nowait(None)

    async def _submitted(self) -> AsyncIterator[tuple[str, Row]]:
        """Submit what has arrived, as far as there is room, until there is no more or nobody wants it."""
        row = await self._next()
        while row is not None:
            await self._has_room()
            portion = [row]
            while len(portion) < min(PORTION, self._room()) and not self._arrived.empty():
                if (row := self._arrived.get_nowait()) is None:
                    break
                portion.append(row)
            if self._stopping:
                return
            self._untaken += len(portion)
            for job in await self._submit(portion, {row.custom_id: self._tries(row) for row in portion}):
                yield job
            row = None if row is None else await self._next()

    def _room(self) -> int:
        return self._window() - self._untaken

    async def _has_room(self) -> None:
        while self._room() < 1 and not self._stopping:
            if self._untaken == 0:
                self.stop()
                return
            self._taken.clear()
            await self._taken.wait()

    async def _next(self) -> Row | None:
        return None if self._stopping else await self._arrived.get()

    async def _submit(self, portion: list[Row], tries: dict[str, int]) -> list[tuple[str, Row]]:
        """Put them in flight, each as the first of its tries from there on that has not failed before this run."""
        left, found, is_repeat = portion, [], False
        while left:
            try:
                jobs = await self._producer.submit_many([self._request(row, tries[row.custom_id]) for row in left])
            except (RedisUnavailable, QueueFull) as error:
                self.held_up = "the lane is full" if isinstance(error, QueueFull) else "Redis can not be reached"
                # Some may have been submitted, and may end before the next look at them: that is this run's failure.
                is_repeat = True
                await asyncio.sleep(_PAUSE_S)
                continue
            except JobConflict as error:
                raise self._other_row(error, left, tries) from None
            self.held_up = ""
            again = [row for job, row in zip(jobs, left, strict=True) if _failed_before(job) and not is_repeat]
            for row in again:
                tries[row.custom_id] += 1
            found += [(job.id, row) for job, row in zip(jobs, left, strict=True) if row not in again]
            left = again
        self.in_flight.update(found)
        if self.cancelled:
            await self.cancel()
        elif self._withdraws:
            await self.withdraw()
        return found

    def _request(self, row: Row, tries: int) -> dict[str, object]:
        return {
            "model": row.model,
            "api": row.api,
            "body": row.body,
            "job_id": job_id_of(self._batch_id, row.custom_id, tries),
            "lane": "batch",
            "tenant": self._tenant,
            "metadata": {"batch": self._batch_id, "custom_id": row.custom_id},
        }

    def _other_row(self, error: JobConflict, rows: list[Row], tries: dict[str, int]) -> InvalidRequest:
        ids = {job_id_of(self._batch_id, row.custom_id, tries[row.custom_id]): row for row in rows}
        row = ids[error.job_id]
        was = f"line {row.line}, {row.custom_id!r}, is another prompt than a row of that id had before"
        where = f"in this run or an earlier one of {self._batch_id}"
        return InvalidRequest("batch_id", f"{was}, {where}; name another id, or leave it to be that of the rows")

    async def _outcome(self, job_id: str, row: Row) -> Outcome:
        started = time.monotonic()
        while True:
            generation = await self._end(job_id, row)
            if self._stopping or not _is_withdrawn(generation):
                return Outcome(row, job_id, generation, time.monotonic() - started)
            # An earlier run has withdrawn it, or another runner of the batch: it is free for its next try.
            ((next_id, _),) = await self._submit([row], {row.custom_id: tries_up_to(job_id)})
            self.in_flight.pop(job_id, None)
            job_id = next_id

    async def _end(self, job_id: str, row: Row) -> Generation:
        while True:
            try:
                return await self._consumer.result(job_id, timeout=_LOOK_S)
            except JobEnded as error:
                return error.generation
            except (ResultTimeout, RedisUnavailable):
                continue
            except JobNotFound:  # the server has forgotten it
                with suppress(RedisUnavailable, QueueFull):
                    await self._producer.submit_many([self._request(row, tries_up_to(job_id) - 1)])
                await asyncio.sleep(_PAUSE_S)
            except StreamExpired:
                why = Failure("result_expired", "its result was not fetched in time; run it again", retryable=True)
                return Generation(status="failed", failure=why)


def _failed_before(job: Job) -> bool:
    return not job.created and job.status in _NO_ANSWER


def _is_withdrawn(generation: Generation) -> bool:
    return generation.cancel_reason == _WITHDRAWN


async def _read(rows: Rows, arrived: asyncio.Queue[Row | None]) -> None:
    if isinstance(rows, AsyncIterable):
        async for row in rows:
            await arrived.put(row)
    else:
        for row in rows:
            await arrived.put(row)
    await arrived.put(None)
