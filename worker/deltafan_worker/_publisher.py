"""The publisher: the one connection on which a worker process writes all its streams.

Appends of all jobs gather for the rest of the event loop's turn, and while a flush is on its way, and go out together:
no timer, no added delay, and the busier the process, the larger its flushes, up to a bound. A connection that is new
has lost an unknown part of what was sent on the last, so nothing is appended on it for a job before that job's
`compare` has run there.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence

from deltafan._errors import RedisUnavailable
from deltafan._keys import Keys
from deltafan._lua import Script
from deltafan._resp import (
    Argument,
    ConnectionLost,
    Handler,
    Reply,
    RespConnection,
    ServerError,
    ignore,
    is_replaced,
    open_connection,
    pack,
)
from deltafan._url import masked_url
from deltafan_worker._interrupt import Reason
from deltafan_worker._replicas import CONFIRM, Replicas
from deltafan_worker._writer import StreamWriter

log = logging.getLogger("deltafan.publisher")

_RETRY_PAUSE_S = 0.2
_FLUSH_BYTES = 262_144
"""Of many streams at once, about so much goes out in one write: whatever a process once held, it keeps."""
_BEAT_PORTION = 16
"""Streams. For 250 at once, each second, a process and its server did nothing else for 15 ms."""
_SLOWEST_LINK_BYTES_PER_S = 500_000
"""A heartbeat behind a large output is answered when that has arrived."""


class Publisher:
    """Writes the streams of one process. `keep_open` runs beside everything that uses it."""

    def __init__(
        self, url: str, keys: Keys, *, beat_s: float, replicas: int = 0, replicas_timeout_ms: int = 500
    ) -> None:
        self.keys = keys
        self._url = url
        self._beat_s = beat_s
        self._replicas = Replicas(url, replicas, replicas_timeout_ms)
        self._connection: RespConnection | None = None
        self._connected = asyncio.Event()
        self._writers: set[StreamWriter] = set()
        self._waiting: dict[StreamWriter, None] = {}
        self._unanswered = 0
        self._is_due = False
        self._taken_bytes = 0
        self._tasks: asyncio.TaskGroup

    def add(self, writer: StreamWriter) -> None:
        """Look after a writer's stream from now on: flushes, heartbeat, healing."""
        self._writers.add(writer)

    def remove(self, writer: StreamWriter) -> None:
        """Stop looking after it."""
        self._writers.discard(writer)
        self._waiting.pop(writer, None)

    def flush_soon(self, writer: StreamWriter) -> None:
        """Send what the writer has, with all that others have by the end of the loop's turn or of the last flush."""
        self._waiting[writer] = None
        if not (self._is_due or self._unanswered):
            self._send_at_turns_end()

    def flush(self, writer: StreamWriter) -> None:
        """Send what the writer has now, with whatever is sent next and ahead of it."""
        self._waiting.pop(writer, None)
        self._send({writer: None}, put_off=True)

    def heal_soon(self, writer: StreamWriter, *, pause: bool = False) -> None:
        """Start the writer's healing, at once or, where the server refuses everybody, after a moment."""
        self._tasks.create_task(_heal(writer, _RETRY_PAUSE_S if pause else 0.0), name=f"heal-{writer.job_id}")

    async def run(self, script: Script, keys: Sequence[str], args: Sequence[Argument]) -> Reply:
        """Run a script on the streams' connection, as often as it takes: scripts are safe to repeat."""
        return await self._insist(script.name, lambda connection: connection.run(script, keys, args))

    async def ask(self, *args: Argument) -> Reply:
        """Run one reading command on the streams' connection, as often as it takes."""
        return await self._insist(str(args[0]), lambda connection: connection.call(*args))

    async def _insist(self, what: str, attempt: Callable[[RespConnection], Awaitable[Reply]]) -> Reply:
        refused = False
        while True:
            await self._connected.wait()
            connection = self._connection
            assert connection is not None
            try:
                return await attempt(connection)
            except ConnectionLost:
                await asyncio.sleep(0)
            except ServerError as error:
                if not refused:
                    log.warning("Redis at %s refused %s (%s); going on trying", masked_url(self._url), what, error)
                refused = True
                await asyncio.sleep(_RETRY_PAUSE_S)
                if is_replaced(error):
                    connection.close()

    def send(self, command: bytes, handler: Handler) -> None:
        """Send a command whose loss does no harm, with whatever is sent next; without a connection it is not sent."""
        if self._connection is not None:
            self._connection.put_off(command, (handler,))

    async def is_durable(self, keys: Sequence[str]) -> bool:
        """Whether the job's end, just written, still stands and has reached the configured replicas.

        Where the replicas can not be asked it must still stand where it was written; an outage is waited out.
        """
        durable = await self._replicas.have_end(keys)
        return await self.run(CONFIRM, keys, ()) == 1 if durable is None else durable

    def on_cancel(self, job_id: str) -> None:
        """A cancel was announced: look at the job's state now instead of with the next heartbeat."""
        for writer in self._writers:
            if writer.job_id == job_id and self._connection is not None:
                command = pack("HMGET", writer.state_key, "run", "cancel")
                self._connection.send(command, (self._checking(writer),))

    async def keep_open(self) -> None:
        """Hold the connection, reopen it when it breaks, and keep the streams alive; runs until cancelled."""
        async with asyncio.TaskGroup() as self._tasks:
            self._tasks.create_task(self._replicas.keep_asking(), name="deltafan-replicas")
            while True:
                await self._serve(await self._open())

    async def _serve(self, connection: RespConnection) -> None:
        """Use a new connection until it is lost, or nobody needs it any more; then close it."""
        self._connection, self._unanswered, self._taken_bytes = connection, 0, 0
        self._connected.set()
        try:
            for writer in tuple(self._writers):
                self.heal_soon(writer)
            await self._beat_until_lost(connection)
        finally:
            self._connected.clear()
            for writer in self._writers:
                writer.stop_flow()  # before the close tells them: there is nothing to heal on, or nobody to do it
            connection.close()
        log.warning("Redis at %s: connection lost; running jobs go on and wait for it", masked_url(self._url))

    async def _open(self) -> RespConnection:
        said = False
        while True:
            try:
                return await open_connection(self._url, timeout_s=5.0, name="deltafan-publisher")
            except RedisUnavailable as error:
                if not said:
                    log.warning("%s; going on trying", error)
                said = True
                await asyncio.sleep(_RETRY_PAUSE_S)

    async def _beat_until_lost(self, connection: RespConnection) -> None:
        """Renew the streams' lifetimes and look for cancels.

        A connection on which nothing is heard for a beat is lost; for longer, where much is under way on it.
        """
        silent_beats = 0
        while True:
            received_bytes = connection.received_bytes
            await self._beat(connection)
            silent_beats = 0 if connection.received_bytes > received_bytes else silent_beats + 1
            under_way_bytes = connection.sent_bytes - self._taken_bytes
            if connection.is_lost or silent_beats * self._beat_s > under_way_bytes / _SLOWEST_LINK_BYTES_PER_S:
                return

    async def _beat(self, connection: RespConnection) -> None:
        """One beat, for a few streams at a time: all at once would hold up what they write."""
        writers = tuple(self._writers)
        portions = [writers[at : at + _BEAT_PORTION] for at in range(0, len(writers), _BEAT_PORTION)] or [()]
        connection.send(pack("PING"), [self._taking(connection.sent_bytes)])
        for portion in portions:
            self._beat_for(connection, portion)
            await asyncio.wait([connection.lost], timeout=self._beat_s / len(portions))
            if connection.is_lost:
                return

    def _beat_for(self, connection: RespConnection, writers: Iterable[StreamWriter]) -> None:
        commands, handlers = [], list[Handler]()
        for writer in writers:
            if writer not in self._writers:
                continue
            commands.append(pack("HMGET", writer.state_key, "run", "cancel"))
            handlers.append(self._checking(writer))
            if writer.is_to_be_renewed:
                commands += [pack("PEXPIRE", key, writer.live_ms) for key in (writer.state_key, writer.events_key)]
                handlers += (ignore, ignore)
        if commands:
            connection.send(b"".join(commands), handlers)

    def _taking(self, sent_bytes: int) -> Handler:
        def take(reply: Reply) -> None:
            if not isinstance(reply, Exception):
                self._taken_bytes = sent_bytes

        return take

    def _checking(self, writer: StreamWriter) -> Handler:
        run = writer.run

        def check(reply: Reply) -> None:
            if isinstance(reply, Exception) or writer.run != run or writer not in self._writers:
                return
            owner, cancel = reply
            if cancel is not None:
                writer.interrupt.cut(Reason.CANCELLED, cancel.decode())
            if run and owner != run.encode():  # before its first attempt `begin` tells
                writer.stop_flow()
                self.heal_soon(writer)

        return check

    def _send(self, writers: dict[StreamWriter, None], *, put_off: bool = False) -> None:
        """Send what they have, in their order and up to a flush's size; those whose turn has come are taken out."""
        if self._connection is None:
            return
        commands: list[bytes] = []
        handlers: list[Handler] = []
        size_bytes = 0
        while writers and size_bytes < _FLUSH_BYTES:
            writer = next(iter(writers))
            del writers[writer]
            if appends := writer.unsent():
                size_bytes += sum(map(len, appends))
                commands += appends
                commands.append(writer.ring)
                handlers += (*(writer.on_append,) * len(appends), ignore)
        if commands:
            handlers[-1] = self._on_answered
            self._unanswered += 1
            send = self._connection.put_off if put_off else self._connection.send
            send(b"".join(commands), handlers)

    def _on_answered(self, reply: Reply) -> None:
        self._unanswered -= 1
        if not (self._is_due or self._unanswered) and self._waiting and not isinstance(reply, ConnectionLost):
            self._send_at_turns_end()

    def _send_at_turns_end(self) -> None:
        self._is_due = True
        asyncio.get_running_loop().call_soon(self._send_waiting)

    def _send_waiting(self) -> None:
        self._is_due = False
        if self._unanswered == 0:
            self._send(self._waiting)


async def _heal(writer: StreamWriter, pause_s: float) -> None:
    if pause_s:
        await asyncio.sleep(pause_s)
    await writer.heal()
