"""Readers of every kind: each reads one job to its end in its own way, through outages, into one transcript."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from redis.asyncio import Redis
from redis.exceptions import RedisError

from deltafan import Consumer, Event, JobEnded, JobNotFound, Position, RedisUnavailable, ResultTimeout, StreamExpired
from fleet import Fleet
from jobs import Job
from silences import Recovery
from transcripts import Transcript


@dataclass
class Reading:
    """What readers share."""

    fleet: Fleet
    consumers: tuple[Consumer, Consumer]
    redis: Redis
    recovery: Recovery = field(default_factory=Recovery)
    beginnings: list[tuple[Job, str, Transcript]] = field(default_factory=list)
    """What readers had of streams that were deleted before they had the end; kind and transcript."""


Kind: TypeAlias = Callable[[Job, Reading, Transcript, random.Random], Awaitable[None]]
"""Goes on with a transcript, to its end if nothing is raised."""


async def plain(job: Job, reading: Reading, transcript: Transcript, _chance: random.Random) -> None:
    """From the start to the end. Tells the faults where jobs run, and how long it was held up."""
    running = reading.fleet.running
    async with reading.consumers[0].tail(job.id, after=transcript.position) as events:
        async for event in events:
            now = time.monotonic()
            if job.lane == "interactive":  # a batch job waits for its provider, and for its turn
                reading.recovery.heard(job.id, transcript.heard_s, now)
            transcript.heard_s = now
            if (started := event.started) is not None:
                running[job.id] = int(started.worker.rpartition(":")[2])
            elif event.is_terminal:
                running.pop(job.id, None)
            transcript.take(event)


async def late(job: Job, reading: Reading, transcript: Transcript, chance: random.Random) -> None:
    """From the start, but not at once."""
    await asyncio.sleep(chance.random())
    await _tail(job, reading.consumers[0], transcript)


async def resuming(job: Job, reading: Reading, transcript: Transcript, chance: random.Random) -> None:
    """In pieces, each from where the last one ended, through one consumer and the other in turn."""
    turn = 0
    while not transcript.status:
        left = chance.randint(1, 15)
        async with reading.consumers[turn % 2].tail(job.id, after=transcript.position) as events:
            async for event in events:
                transcript.take(event)
                left -= 1
                if left == 0:
                    break
        turn += 1


async def from_a_snapshot(job: Job, reading: Reading, transcript: Transcript, chance: random.Random) -> None:
    """What there is by now, then on from there."""
    if transcript.position is None:
        await asyncio.sleep(chance.random() / 2)
        transcript.take_generation(await reading.consumers[1].snapshot(job.id))
    if not transcript.status:
        await _tail(job, reading.consumers[1], transcript)


async def stopping(job: Job, reading: Reading, transcript: Transcript, _chance: random.Random) -> None:
    """One that stops reading whenever the fleet says so, with its tail open."""
    fleet = reading.fleet
    async with reading.consumers[0].tail(job.id, after=transcript.position) as events:
        fleet.stopping[job.id] = transcript
        try:
            async for event in events:
                await fleet.reads_on.wait()
                transcript.take(event)
        finally:
            del fleet.stopping[job.id]


async def only_the_result(job: Job, reading: Reading, transcript: Transcript, _chance: random.Random) -> None:
    """The answer, when it is whole."""
    while not transcript.status:
        try:
            transcript.take_generation(await reading.consumers[1].result(job.id, timeout=5))
        except JobEnded as ended:
            transcript.take_generation(ended.generation)
        except ResultTimeout:
            continue


async def with_xread(job: Job, reading: Reading, transcript: Transcript, _chance: random.Random) -> None:
    """Nothing but XREAD, by the reader's rules of PROTOCOL.md, written once more."""
    key = f"deltafan:{{{job.id}}}:events"
    while not transcript.status:
        cursor = str(transcript.position or "0-0")
        try:
            answer = await reading.redis.xread({key: cursor}, count=50, block=500)
            if not answer and await _is_gone(job, reading):
                raise StreamExpired(job.id, result_available=True)
        except (RedisError, OSError, RuntimeError):
            await asyncio.sleep(0.1)
            continue
        hole = False
        for _, entries in answer or ():
            for raw_id, fields in entries:
                event = Event(Position.parse(raw_id), fields[b"type"].decode(), fields[b"data"])
                hole = not _may_be_taken(event, transcript.position, behind_a_hole=hole)
                if not hole:
                    transcript.take(event)
        if answer and cursor == str(transcript.position or "0-0"):
            await asyncio.sleep(0.05)


async def _tail(job: Job, consumer: Consumer, transcript: Transcript) -> None:
    async with consumer.tail(job.id, after=transcript.position) as events:
        async for event in events:
            transcript.take(event)


async def _is_gone(job: Job, reading: Reading) -> bool:
    """Whether the stream was deleted behind its end."""
    stream, result = (f"deltafan:{{{job.id}}}:{name}" for name in ("events", "result"))
    return not await reading.redis.exists(stream) and bool(await reading.redis.exists(result))


def _may_be_taken(event: Event, cursor: Position | None, *, behind_a_hole: bool) -> bool:
    """Rule 1: the next of the same attempt, or the start of a later one; behind a hole only one that owes nothing."""
    if event.position.seq == 0 and (cursor is None or event.position.attempt > cursor.attempt):
        return not behind_a_hole or event.started is None or event.started.mode != "continue"
    return not behind_a_hole and cursor is not None and event.position == (cursor.attempt, cursor.seq + 1)


KINDS: dict[str, Kind] = {
    "plain": plain,
    "late": late,
    "late again": late,
    "late as well": late,
    "resuming": resuming,
    "resuming too": resuming,
    "from a snapshot": from_a_snapshot,
    "stopping": stopping,
    "only the result": only_the_result,
    "with XREAD": with_xread,
}
"""By the names that jobs give their readers; several of a kind have names of their own."""


async def read(
    job: Job, kind: str, reading: Reading, chance: random.Random, again: Callable[[Job], Awaitable[None]]
) -> Transcript:
    """Read as this kind does, through outages; `again` submits a job once more that the server has forgotten."""
    transcript, way = Transcript(), KINDS[kind]
    while not transcript.status:
        try:
            await way(job, reading, transcript, chance)
        except RedisUnavailable:
            await asyncio.sleep(0.1)
        except StreamExpired as expired:
            if expired.result_available:  # the stream was deleted behind its end
                reading.beginnings.append((job, kind, transcript))
                transcript, way = Transcript(), only_the_result
            else:
                await again(job)
        except JobNotFound:
            await again(job)
    return transcript
