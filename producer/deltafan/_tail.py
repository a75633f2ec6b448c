"""Tails: iterators over a job's events, however many of them share one job."""

import asyncio
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Self, cast

import orjson

from deltafan._errors import InvalidPosition, JobNotFound, ProtocolError, RedisUnavailable, StreamExpired
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
            InvalidPosition: the job has ended before the position that the tail was to go on from.
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
            self.feed.pump((self,))
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
        if self._waiter is not None:
            raise RuntimeError("another task waits for this tail's next event: open a tail for each")
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def take(job_id: str, follower: Follower, entries: Sequence[RawEntry]) -> list[Event]:
    """`follower.take`, where an entry may be anybody's.

    Raises:
        ProtocolError: one is not what PROTOCOL.md says.
    """
    try:
        return follower.take(entries)
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise ProtocolError(f"job {job_id} has an entry that is not ours to read: {error!r}") from error


class Feed:
    """All tails of one job in this process. Tails that stand at the same position share one read and one decoding."""

    def __init__(self, hub: Hub, keys: Keys, job_id: str) -> None:
        self._hub = hub
        self._job_id = job_id
        self._events_key, self._state_key, self._result_key = keys.job(job_id)
        self.tails: set[Tail] = set()
        self._surveyed: tuple[Tail, ...] | None = None
        self._survey_again = False

    def join(self, tail: Tail) -> None:
        """Read for one more tail."""
        tail.feed = self
        self.tails.add(tail)
        self.on_sweep()
        self.pump((tail,))

    def on_bell(self, _status: bytes) -> None:
        """Listener: there is something to read."""
        for tail in self.tails:
            tail.unread = True
        self.pump(self.tails)

    def on_failure(self, error: Exception) -> None:
        """Listener: the hub has ended."""
        self._fail(self.tails, error)

    def on_sweep(self) -> None:
        """Listener: look at the stream's top and at what is left of the job; one look at a time, for all who ask."""
        if self._surveyed is not None:
            self._survey_again = True
            return
        self._surveyed = tuple(self.tails)
        # A job may end between two of these: what appears with its end is looked at last.
        commands = (
            pack("EXISTS", ARQ_JOB + self._job_id),
            pack("HGET", self._state_key, "status"),
            pack("EXISTS", self._result_key),
            pack("XREVRANGE", self._events_key, "+", "-", "COUNT", 1),
        )
        self._hub.read(commands, self._on_survey)

    def pump(self, tails: Iterable[Tail]) -> None:
        """Read for those that have room, once per position."""
        groups: defaultdict[tuple[Position | None, str], list[Tail]] = defaultdict(list)
        for tail in tails:
            if tail.is_hungry:
                tail.reading, tail.unread = True, False
                # Behind a hole two may read the same page and stand at different positions.
                groups[tail.follower.cursor, tail.follower.range_start].append(tail)
        for (_, start), group in groups.items():
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
            events = take(self._job_id, leader, entries)
        except ProtocolError as error:
            self._fail(group, error)
            return
        for tail in group:
            tail.follower.follow(leader)
            tail.unread = tail.unread or len(entries) == PAGE
            tail.deliver(events)
        self.pump(group)

    def _on_survey(self, replies: list[Reply] | None) -> None:
        tails, self._surveyed = self._surveyed or (), None
        if self._survey_again:
            self._survey_again = False
            self.on_sweep()
        if replies is None or any(isinstance(reply, ServerError) for reply in replies):
            return
        is_queued, status, has_result, entries = replies
        if entries:
            self._look_at(tails, Position.parse(entries[0][0]), entries[0][1][1].decode())
        elif has_result:
            self._hub.read((pack("GET", self._result_key),), partial(self._on_result, tails))
        elif status is not None and status.decode() in TERMINAL_TYPES:
            self._fail(tails, StreamExpired(self._job_id, result_available=False))
        elif status is None and not is_queued:
            for tail in tails:
                unseen = tail.follower.cursor is None
                tail.fail(JobNotFound(self._job_id) if unseen else StreamExpired(self._job_id, result_available=False))

    def _look_at(self, tails: Sequence[Tail], top: Position, kind: str) -> None:
        for tail in tails:
            tail.follower.look_again()
            cursor = tail.follower.cursor
            if kind in TERMINAL_TYPES and cursor == top:
                tail.end()
            elif kind in TERMINAL_TYPES and cursor is not None and cursor > top:
                tail.fail(
                    InvalidPosition(str(cursor), f"is not in the stream of job {self._job_id}, which ends at {top}")
                )
            tail.unread = tail.unread or cursor is None or top > cursor
        self.pump(tails)

    def _on_result(self, tails: Sequence[Tail], replies: list[Reply] | None) -> None:
        """The stream has expired, which is nothing to a tail that stands at its end."""
        if replies is None or isinstance(replies[0], ServerError):
            return
        end = _end_of(replies[0])
        for tail in tails:
            if end is not None and tail.follower.cursor == end:
                tail.end()
            else:
                tail.fail(StreamExpired(self._job_id, result_available=replies[0] is not None))

    @staticmethod
    def _fail(tails: Iterable[Tail], error: Exception) -> None:
        for tail in tails:
            tail.fail(error)


def _end_of(result: bytes | None) -> Position | None:
    """The terminal entry's position, by a result record."""
    with suppress(ValueError, TypeError, LookupError):
        return Position.parse(orjson.loads(result or b"null")["position"])
    return None


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
                feed.join(tail)
                yield tail
        finally:
            feed.tails.discard(tail)
            tail.fail(RuntimeError("this tail is closed: read it inside its `async with` block"))
            if not feed.tails and self._feeds.get(job_id) is feed:
                del self._feeds[job_id]
