"""Readers of every kind: each reads one job to its end in its own way and gives its transcript."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from redis.asyncio import Redis
from redis.exceptions import RedisError

from deltafan import Consumer, Event, JobEnded, JobNotFound, Position, RedisUnavailable, ResultTimeout, StreamExpired
from transcripts import Job, Transcript


@dataclass
class Reading:
    """What readers share: the connections, and the longest silence that any of them met."""

    consumers: tuple[Consumer, Consumer]
    redis: Redis
    chance: random.Random
    again: Callable[[Job], Awaitable[None]]
    """Submits a job that the server has forgotten once more."""
    longest_silence_s: float = 0.0
    events: int = 0
    seen_modes: dict[str, int] = field(default_factory=dict)


async def plain(job: Job, reading: Reading) -> Transcript:
    """From the start to the end."""
    transcript, heard = Transcript(), 0.0
    async with reading.consumers[0].tail(job.id) as events:
        async for event in events:
            now = time.monotonic()
            if heard:  # how long it waited in the queue is another matter
                reading.longest_silence_s = max(reading.longest_silence_s, now - heard)
            heard = now
            reading.events += 1
            if event.started is not None:
                mode = event.started.mode
                reading.seen_modes[mode] = reading.seen_modes.get(mode, 0) + 1
            transcript.take(event)
    return transcript


async def late(job: Job, reading: Reading) -> Transcript:
    """From the start, but not at once."""
    await asyncio.sleep(reading.chance.random())
    return await plain(job, reading)


async def resuming(job: Job, reading: Reading) -> Transcript:
    """In pieces, each from where the last one ended, through one consumer and the other in turn."""
    transcript, after, turn = Transcript(), None, 0
    while not transcript.status:
        left = reading.chance.randint(1, 15)
        async with reading.consumers[turn % 2].tail(job.id, after=after) as events:
            async for event in events:
                transcript.take(event)
                after, left = event.position, left - 1
                if left == 0:
                    break
        turn += 1
    return transcript


async def from_a_snapshot(job: Job, reading: Reading) -> Transcript:
    """What there is by now, then on from there."""
    await asyncio.sleep(reading.chance.random() / 2)
    transcript = Transcript()
    snapshot = await reading.consumers[1].snapshot(job.id)
    transcript.take_text(snapshot.reasoning + snapshot.content)
    if snapshot.is_ended:
        transcript.status = snapshot.status
        return transcript
    async with reading.consumers[1].tail(job.id, after=snapshot.position) as events:
        async for event in events:
            transcript.take(event)
    return transcript


async def stopping(job: Job, reading: Reading) -> Transcript:
    """One that stops reading for a while."""
    transcript = Transcript()
    async with reading.consumers[0].tail(job.id) as events:
        async for event in events:
            transcript.take(event)
            if event.position.seq == 3:
                await asyncio.sleep(1)
    return transcript


async def only_the_result(job: Job, reading: Reading) -> Transcript:
    """The answer, when it is whole."""
    while True:
        try:
            result = await reading.consumers[1].result(job.id, timeout=5)
        except ResultTimeout:
            continue
        except JobEnded as ended:
            result = ended.generation
        transcript = Transcript(status=result.status)
        transcript.take_text(result.reasoning + result.content)
        return transcript


async def with_xread(job: Job, reading: Reading) -> Transcript:
    """Nothing but XREAD, by the reader's rules of PROTOCOL.md, written once more."""
    transcript, cursor = Transcript(), "0-0"
    key = f"deltafan:{{{job.id}}}:events"
    while not transcript.status:
        try:
            answer = await reading.redis.xread({key: cursor}, count=50, block=500)
        except (RedisError, OSError, RuntimeError):
            await asyncio.sleep(0.1)
            continue
        if not answer and await _is_gone(job, reading):
            return await only_the_result(job, reading)
        before = cursor
        for _, entries in answer or ():
            for raw_id, fields in entries:
                event = Event(Position.parse(raw_id), fields[b"type"].decode(), fields[b"data"])
                if _is_next(Position.parse(cursor), event):  # else it stands behind a hole
                    transcript.take(event)
                    cursor = raw_id.decode()
        if answer and cursor == before:
            await asyncio.sleep(0.05)
    return transcript


async def _is_gone(job: Job, reading: Reading) -> bool:
    """Whether the stream was deleted behind its end."""
    try:
        stream, result = (f"deltafan:{{{job.id}}}:{name}" for name in ("events", "result"))
        return not await reading.redis.exists(stream) and bool(await reading.redis.exists(result))
    except (RedisError, OSError, RuntimeError):
        return False


def _is_next(cursor: Position, event: Event) -> bool:
    """The next of the same attempt, or the start of a later one: none of these continues another."""
    if event.position == (cursor.attempt, cursor.seq + 1):
        return True
    return event.position.seq == 0 and event.position.attempt > cursor.attempt


KINDS = (plain, late, resuming, from_a_snapshot, stopping, only_the_result, with_xread)


async def read(job: Job, kind: Callable[[Job, Reading], Awaitable[Transcript]], reading: Reading) -> Transcript:
    """Read as this kind does, through outages; a job that the server forgot is submitted again."""
    while True:
        try:
            return await kind(job, reading)
        except RedisUnavailable:
            await asyncio.sleep(0.1)
        except StreamExpired as expired:
            if expired.result_available:  # the stream was deleted behind its end
                return await only_the_result(job, reading)
            await reading.again(job)
        except JobNotFound:  # of a server that came back empty
            await reading.again(job)
