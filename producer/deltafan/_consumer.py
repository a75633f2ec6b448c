"""Consumer: reads generations: live, from any position, as a snapshot, or only the result."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from typing import NamedTuple, Self, cast

import orjson

from deltafan._errors import (
    JobCancelled,
    JobError,
    JobFailed,
    JobNotFound,
    ProtocolError,
    RedisUnavailable,
    ResultTimeout,
    StreamExpired,
)
from deltafan._events import CANCELLED, COMPLETED, FAILED, TERMINAL_TYPES, Event
from deltafan._fold import Fold, Generation
from deltafan._follow import Follower, RawEntry
from deltafan._hub import Hub, open_hub
from deltafan._keys import ARQ_JOB, Keys
from deltafan._position import Position
from deltafan._request import check_job_id
from deltafan._resp import pack
from deltafan._tail import PAGE, Feeds, Tail, take

_FIRST_LOOK_S = 1.0
"""How long the first look at a result may take, however short its caller's timeout."""


class TurnEvent(NamedTuple):
    """An event of a conversation, and the job it belongs to."""

    job_id: str
    event: Event


class Consumer:
    """Reads jobs. One instance serves a whole process: all its readers share two connections.

    Open it with `async with Consumer.connect(url) as consumer`.
    """

    def __init__(self, hub: Hub, keys: Keys) -> None:
        self._hub = hub
        self._keys = keys
        self._feeds = Feeds(hub, keys)

    @classmethod
    @asynccontextmanager
    async def connect(
        cls,
        streams_url: str = "redis://localhost:6379/0",
        *,
        prefix: str = "deltafan",
        connect_timeout_s: float = 1.0,
    ) -> AsyncIterator[Self]:
        """Connect to the server that holds the streams.

        Raises:
            RedisUnavailable: no server answers within `connect_timeout_s`. One that goes away later is waited for.
        """
        async with open_hub(streams_url, connect_timeout_s=connect_timeout_s) as hub:
            yield cls(hub, Keys(prefix))

    def tail(self, job_id: str, *, after: Position | str | None = None) -> AbstractAsyncContextManager[Tail]:
        """The job's events after a position (from the start without one), then live, until its terminal event.

        Use as `async with consumer.tail(job_id) as events: async for event in events: …`. Ending the block reads no
        further and cancels nothing.

        Raises:
            InvalidPosition: `after` is not a position.
            InvalidPosition, JobNotFound, StreamExpired: from the iteration; the first when `after` is beyond the end.
        """
        return self._feeds.tail(check_job_id(job_id), None if after is None else Position.parse(after))

    @asynccontextmanager
    async def tail_conversation(
        self, job_id: str, *, after: Position | str | None = None
    ) -> AsyncIterator[AsyncIterator[TurnEvent]]:
        """As `tail`, and on through the jobs that answer its tool calls, until a turn ends without one.

        Between two turns it waits for `Producer.submit_tool_results`, as long as the job is known. `after` is a
        position in the first job.

        Raises:
            as `tail`.
        """
        first = None if after is None else Position.parse(after)
        async with aclosing(self._turns(check_job_id(job_id), first)) as turns:
            yield turns

    async def _turns(self, job_id: str, after: Position | None) -> AsyncGenerator[TurnEvent, None]:
        turn: str | None = job_id
        while turn is not None:
            async with self.tail(turn, after=after) as events:
                async for event in events:
                    yield TurnEvent(turn, event)
            generation = await self._look_up(turn, for_ever=True)
            asks = generation.status == COMPLETED and generation.tool_calls
            turn, after = await self._next_turn(turn) if asks else None, None

    async def _next_turn(self, job_id: str) -> str | None:
        """The job that answers this one's tool calls, once there is one; None when this one is forgotten."""
        state, watch = self._keys.state, _Watch(any_ring=True)
        async with self._hub.listening(self._keys.bell(job_id), watch):
            while True:
                is_known, following = await self._hub.ask(
                    pack("EXISTS", state(job_id)), pack("HGET", state(job_id), "next"), for_ever=True
                )
                if following is not None:
                    # It has its name before it is submitted, so that a repeated submit is the same job.
                    (is_submitted,) = await self._hub.ask(pack("EXISTS", state(following.decode())), for_ever=True)
                    if is_submitted:
                        return cast(bytes, following).decode()
                elif not is_known:
                    return None
                await watch.changed()

    async def snapshot(self, job_id: str) -> Generation:
        """What the job has produced so far. Tail on from `snapshot.position` to go on without a gap or a repeat.

        Should an attempt follow that goes on from a position before it (`event.started.from_`), which takes a failover
        that has lost entries, take a new snapshot: this one does not say where its text is to be cut.

        Raises:
            JobNotFound: nothing is known of the job.
            StreamExpired: it has ended, and neither stream nor result is left.
            ProtocolError: an entry is not what PROTOCOL.md says.
        """
        check_job_id(job_id)
        follower, folding = Follower(), Fold()
        while True:
            (page,) = await self._hub.ask(
                pack("XRANGE", self._keys.events(job_id), follower.range_start, "+", "COUNT", PAGE)
            )
            for event in take(job_id, follower, cast(list[RawEntry], page)):
                folding.add(event)
            if len(page) < PAGE:
                break
        if follower.cursor is not None:
            return folding.generation()
        return await self._look_up(job_id)

    async def result(self, job_id: str, *, timeout: float | None = None) -> Generation:
        """The completed generation, once the job has ended; waits without reading the stream.

        A server that goes away is waited for as well, as long as `timeout` says.

        Raises:
            JobFailed, JobCancelled: it ended without completing; `error.generation` has what there is.
            ResultTimeout: it has not ended after `timeout` seconds; with 0, it has not ended now.
            JobNotFound, StreamExpired: it is not known, or nothing of it is left.
        """
        watch, status = _Watch(), "unknown"
        until = None if timeout is None else asyncio.get_running_loop().time() + timeout
        first_look_s = None if timeout is None else max(timeout, _FIRST_LOOK_S)
        try:
            async with (
                asyncio.timeout(first_look_s) as limit,
                self._hub.listening(self._keys.bell(check_job_id(job_id)), watch),
            ):
                while not (generation := await self._look_up(job_id, for_ever=True)).is_ended:
                    status = generation.status
                    limit.reschedule(until)
                    await watch.changed()
        except TimeoutError:
            raise ResultTimeout(job_id, timeout or 0, status) from None
        if generation.status != COMPLETED:
            generation = await self._with_output(job_id, generation)
        if generation.status == FAILED:
            why = generation.failure
            raise JobFailed(job_id, f"failed: {why.message} ({why.code})" if why else "failed", generation)
        if generation.status == CANCELLED:
            raise JobCancelled(job_id, f"cancelled ({generation.cancel_reason})", generation)
        return generation

    async def _with_output(self, job_id: str, generation: Generation) -> Generation:
        """A job that ended in nobody's attempt (seq 0) has a result without what its stream may still hold of it."""
        if generation.position is not None and generation.position.seq == 0:
            with suppress(JobError, ProtocolError, RedisUnavailable):
                found = await self.snapshot(job_id)
                return found if found.is_ended else generation
        return generation

    async def _look_up(self, job_id: str, *, for_ever: bool = False) -> Generation:
        """The stored result, or just the status of a job that has not ended."""
        # A job may end between two of these: what appears with its end is looked at last. (arq's record has no hash
        # tag: with the streams in a cluster, this question and a feed's must go to the queue's server.)
        is_queued, status, result = await self._hub.ask(
            pack("EXISTS", ARQ_JOB + job_id),
            pack("HGET", self._keys.state(job_id), "status"),
            pack("GET", self._keys.result(job_id)),
            for_ever=for_ever,
        )
        if result is not None:
            return Generation.from_json(orjson.loads(result))
        if status is None and not is_queued:
            raise JobNotFound(job_id)
        name = "queued" if status is None else status.decode()
        if name in TERMINAL_TYPES:
            raise StreamExpired(job_id, result_available=False)
        return Generation(status=name)


class _Watch:
    """Waits for the ring that says how the job ended, or for any; a sweep counts as one, since rings can be lost."""

    def __init__(self, *, any_ring: bool = False) -> None:
        self._event = asyncio.Event()
        self._any_ring = any_ring
        self._failure: Exception | None = None

    def on_bell(self, status: bytes) -> None:
        if status or self._any_ring:
            self._event.set()

    def on_sweep(self) -> None:
        self._event.set()

    def on_failure(self, error: Exception) -> None:
        self._failure = error
        self._event.set()

    async def changed(self) -> None:
        await self._event.wait()
        self._event.clear()
        if self._failure is not None:
            raise self._failure
