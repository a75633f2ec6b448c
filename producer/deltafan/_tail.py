"""Tails: iterators over a job's events, however many of them share one job."""

import asyncio
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Self, cast

from deltafan._errors import JobNotFound, ProtocolError, RedisUnavailable, StreamExpired
from deltafan._events import TERMINAL_TYPES, Event
from deltafan._follow import Follower, RawEntry
from deltafan._hub import Hub
from deltafan._keys import ARQ_JOB, Keys
from deltafan._position import Position
from deltafan._resp import Reply, ServerError, is_passing, pack

PAGE = 1000
"""Entries per read: one round trip for any answer of ordinary length, and the measure of what a slow reader holds."""


class Tail:
    """The events of one job after a position; ends after the terminal event.

    A slow reader holds at most two pages and costs nobody else time: nothing is read before there is room for it.
    """

    def __init__(self, job_id: str, after: Position | None) -> None:
        self.job_id = job_id
        self._position = after
        self.follower = Follower(after)
        self.feed: Feed | None = None
        self.unread = True
        self.reading = False
        self._events: deque[Event] = deque()
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def position(self) -> Position | None:
        """The last event handed out, or where the tail began: resume here."""
        return self._position

    @property
    def is_hungry(self) -> bool:
        """Whether there is something to read and room for it."""
        room = len(self._events) < PAGE and self._error is None and not self.follower.ended
        return self.unread and not self.reading and room

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        """The next event.

        Raises:
            JobNotFound: nothing is known of the job.
            StreamExpired: its entries are gone.
        """
        events = self._events
        while not events:
            if self._error is not None:
                raise self._error
            if self.follower.ended:
                raise StopAsyncIteration
            await self._wait()
        event = events.popleft()
        self._position = event[0]
        if self.unread and self.is_hungry and self.feed is not None:
            self.feed.pump()
        return event

    def deliver(self, events: Sequence[Event]) -> None:
        """Take events that follow on the last delivered ones."""
        self._events.extend(events)
        self._wake()

    def end(self) -> None:
        """Nothing follows: the tail stands at the end of a stream that has ended."""
        self.follower.ended = True
        self._wake()

    def fail(self, error: Exception) -> None:
        """Raise `error` to the reader behind all that was delivered; one that has the end needs to hear of nothing."""
        if not self.follower.ended:
            self._error = error
            self._wake()

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Feed:
    """All tails of one job in this process. Tails that stand at the same position share one read and one decoding."""

    def __init__(self, hub: Hub, keys: Keys, job_id: str) -> None:
        self._hub = hub
        self._job_id = job_id
        self._events_key, self._state_key, self._result_key = keys.job(job_id)
        self.tails: set[Tail] = set()

    def on_bell(self, _status: bytes) -> None:
        """Listener: there is something to read."""
        for tail in self.tails:
            tail.unread = True
        self.pump()

    def on_failure(self, error: Exception) -> None:
        """Listener: the hub has ended."""
        self._fail(self.tails, error)

    def on_sweep(self) -> None:
        """Listener: look at the stream's top and at what is left of the job."""
        commands = (
            pack("XREVRANGE", self._events_key, "+", "-", "COUNT", 1),
            pack("HGET", self._state_key, "status"),
            pack("EXISTS", self._result_key),
            pack("EXISTS", ARQ_JOB + self._job_id),
        )
        self._hub.read(commands, self._on_survey)

    def pump(self) -> None:
        """Read for every tail that has room, once per position."""
        groups: defaultdict[str, list[Tail]] = defaultdict(list)
        for tail in self.tails:
            if tail.is_hungry:
                tail.reading, tail.unread = True, False
                groups[tail.follower.range_start].append(tail)
        for start, group in groups.items():
            command = pack("XRANGE", self._events_key, start, "+", "COUNT", PAGE)
            self._hub.read((command,), partial(self._on_page, group))

    def _on_page(self, group: list[Tail], replies: list[Reply] | None) -> None:
        for tail in group:
            tail.reading = False
        if replies is None:
            return  # the sweep after the reconnect reads again
        if isinstance(replies[0], ServerError):
            if is_passing(replies[0]):  # the next sweep reads again
                for tail in group:
                    tail.unread = True
            else:
                self._fail(group, RedisUnavailable(self._hub.shown_url, f"it refused to read a stream ({replies[0]})"))
            return
        entries = cast(Sequence[RawEntry], replies[0])
        leader = group[0].follower
        try:
            events = leader.take(entries)
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            self._fail(group, ProtocolError(f"job {self._job_id} has an entry that is not ours to read: {error!r}"))
            return
        for tail in group:
            tail.follower.follow(leader)
            tail.unread = tail.unread or len(entries) == PAGE
            tail.deliver(events)
        self.pump()

    def _on_survey(self, replies: list[Reply] | None) -> None:
        if replies is None or any(isinstance(reply, ServerError) for reply in replies):
            return
        entries, status, has_result, is_queued = replies
        if entries:
            top, has_ended = Position.parse(entries[0][0]), entries[0][1][1].decode() in TERMINAL_TYPES
            for tail in self.tails:
                tail.follower.look_again()
                if has_ended and tail.follower.cursor is not None and tail.follower.cursor >= top:
                    tail.end()
                tail.unread = tail.unread or tail.follower.cursor is None or top > tail.follower.cursor
            self.pump()
        elif has_result or (status is not None and status.decode() in TERMINAL_TYPES):
            self._fail(self.tails, StreamExpired(self._job_id, result_available=bool(has_result)))
        elif status is None and not is_queued:
            for tail in self.tails:
                unseen = tail.follower.cursor is None
                tail.fail(JobNotFound(self._job_id) if unseen else StreamExpired(self._job_id, result_available=False))

    @staticmethod
    def _fail(tails: Iterable[Tail], error: Exception) -> None:
        for tail in tails:
            tail.fail(error)


class Feeds:
    """The feeds of a hub, one per job that is being tailed."""

    def __init__(self, hub: Hub, keys: Keys) -> None:
        self._hub = hub
        self._keys = keys
        self._feeds: dict[str, Feed] = {}

    @asynccontextmanager
    async def tail(self, job_id: str, after: Position | None) -> AsyncIterator[Tail]:
        """A tail for the block's time. The bell is subscribed to before the first read, so nothing falls between."""
        feed = self._feeds.setdefault(job_id, Feed(self._hub, self._keys, job_id))
        tail = Tail(job_id, after)
        try:
            async with self._hub.listening(self._keys.bell(job_id), feed):
                tail.feed = feed
                feed.tails.add(tail)
                feed.on_sweep()
                feed.pump()
                yield tail
        finally:
            feed.tails.discard(tail)
            tail.fail(RuntimeError("this tail is closed: read it inside its `async with` block"))
            if not feed.tails and self._feeds.get(job_id) is feed:
                del self._feeds[job_id]
