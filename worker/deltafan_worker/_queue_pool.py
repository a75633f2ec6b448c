"""The queue's connections: redis-py's, made for arq, and our own: for scripts, heartbeats and doorbells."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from arq.connections import ArqRedis
from redis.asyncio import BlockingConnectionPool
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError, ResponseError

from deltafan._errors import RedisUnavailable
from deltafan._lua import Script
from deltafan._resp import ConnectionLost, RespConnection, ServerError, is_replaced, open_connection
from deltafan_worker.serialization import deserialize, serialize

MAX_CONNECTIONS = 64
_CONNECT_TIMEOUT_S = 5.0
_SILENCE_S = 10.0
_SCRIPTS_SILENCE_S = 3.0
"""All that a worker tells its queue waits there: what a dead link holds up is told again before leases run out."""
PATIENCE_S = 0.5
"""A server that has said nothing for so long may be gone. One that was only asked a moment ago has others to answer."""


class QueuePool(ArqRedis):
    """arq's client of the queue's server."""

    scripts: "_Pipelined"
    heartbeats: "_Pipelined"
    doorbells: "_Pipelined"


@asynccontextmanager
async def queue_pool(url: str) -> AsyncIterator[QueuePool]:
    """Connections for the block's time."""
    keepalive = {} if url.startswith("unix:") else {"socket_keepalive": True}
    # Our scripts are safe to repeat, but a WATCH of arq's is not: no retries inside the client.
    connections = BlockingConnectionPool.from_url(
        url,
        max_connections=MAX_CONNECTIONS,
        timeout=5,
        socket_connect_timeout=_CONNECT_TIMEOUT_S,
        socket_timeout=_SILENCE_S,
        client_name="deltafan-queue",
        **keepalive,
    )
    connections.connection_class = _losing(connections.connection_class)
    pool = QueuePool(connections, job_serializer=serialize, job_deserializer=deserialize)
    pool.scripts = _Pipelined(url, "deltafan-queue", patience_s=PATIENCE_S, silence_s=_SCRIPTS_SILENCE_S)
    pool.heartbeats = _Pipelined(url, "deltafan-heartbeat", patience_s=0.0, silence_s=_SCRIPTS_SILENCE_S)
    pool.doorbells = _Pipelined(url, "deltafan-doorbell", patience_s=0.0, silence_s=_SILENCE_S)
    try:
        yield pool
    finally:
        for connection in (pool.scripts, pool.heartbeats, pool.doorbells):
            connection.close()
        await pool.aclose(close_connection_pool=True)


async def run_script(
    pool: QueuePool, script: Script, keys: Sequence[str], args: Sequence[Any], *, is_heartbeat: bool = False
) -> Any:
    """Run a script of the queue's server; a heartbeat waits behind no other, and is given up without any other.

    Raises:
        ConnectionError: redis-py's; the script may have run.
        ResponseError: redis-py's; the server refuses it.
    """
    pipelined = pool.heartbeats if is_heartbeat else pool.scripts
    return await pipelined.ask(lambda connection: connection.run(script, keys, args))


async def hear_a_ring(pool: QueuePool, doorbells: Sequence[str], *, within_s: float) -> None:
    """Wait at doorbells. A ring that comes after a cancel stays, once the server has noticed that.

    Raises:
        ConnectionError: redis-py's.
        ResponseError: redis-py's.
    """
    await pool.doorbells.ask(lambda connection: connection.call("BLPOP", *doorbells, within_s))


class _Pipelined:
    """A connection of our own, opened when it is wanted. redis-py's spends 0.2 ms of CPU more on each command.

    Who is cancelled after `patience_s` without hearing anything gives it up, for all who wait there.
    """

    def __init__(self, url: str, name: str, *, patience_s: float, silence_s: float) -> None:
        self._url = url
        self._name = name
        self._patience_s = patience_s
        self._silence_s = silence_s
        self._connection: RespConnection | None = None
        self._opening = asyncio.Lock()
        self._failure: RedisUnavailable | None = None
        self._is_closed = False

    async def ask(self, command: Callable[[RespConnection], Awaitable[Any]]) -> Any:
        connection = await self._open()
        clock = asyncio.get_running_loop().time
        heard_bytes, asked_s = connection.received_bytes, clock()
        try:
            return await command(connection)
        except ConnectionLost as error:
            raise RedisConnectionError(str(error)) from error
        except ServerError as error:
            if is_replaced(error):
                connection.close()
            raise ResponseError(str(error)) from error
        except asyncio.CancelledError:
            if connection.received_bytes == heard_bytes and clock() - asked_s >= self._patience_s:
                connection.close()  # it may be dead: the next one is to find out on another
            raise

    async def _open(self) -> RespConnection:
        if (connection := self._usable) is not None:
            return connection
        failure = self._failure
        async with self._opening:
            if (connection := self._usable) is not None:
                return connection
            if self._is_closed:
                raise RedisConnectionError("the queue's connections are closed")
            if self._failure is not None and self._failure is not failure:  # tried by another while this one waited
                raise RedisConnectionError(str(self._failure)) from self._failure
            try:
                self._connection = connection = await open_connection(
                    self._url, timeout_s=_CONNECT_TIMEOUT_S, name=self._name, silence_s=self._silence_s
                )
            except RedisUnavailable as error:
                self._failure = error
                raise RedisConnectionError(str(error)) from error
            self._failure = None
            self._lose_if_closed()  # meanwhile: what is asked of it is lost like all else
            return connection

    @property
    def _usable(self) -> RespConnection | None:
        return None if self._connection is None or self._connection.is_lost else self._connection

    def close(self) -> None:
        """Lose it, and open no other."""
        self._is_closed = True
        self._lose_if_closed()

    def _lose_if_closed(self) -> None:
        if self._is_closed and self._connection is not None:
            self._connection.close()


class _Losing:
    """What redis-py's connections get wrong when they are cut, their server is replaced, or their user cancelled."""

    async def send_packed_command(self, *args: Any, **options: Any) -> None:
        task = asyncio.current_task()
        cancels = task.cancelling() if task is not None else 0
        try:
            await super().send_packed_command(*args, **options)  # type: ignore[misc]  # of what it is mixed into
        except RuntimeError as error:  # uvloop's name for writing to a connection that has just been cut
            raise RedisConnectionError(str(error)) from error
        if task is not None and task.cancelling() > cancels:
            # Python 3.11's wait_for, in there, forgets a cancel that comes as the write ends.
            await self.disconnect(nowait=True)  # type: ignore[attr-defined]  # so that nobody reads this one's reply
            raise asyncio.CancelledError

    async def read_response(self, *args: Any, **options: Any) -> Any:
        try:
            return await super().read_response(*args, **options)  # type: ignore[misc]
        except ReadOnlyError:  # a primary that was demoted keeps its connections, while its name leads to another
            await self.disconnect(nowait=True)  # type: ignore[attr-defined]
            raise


def _losing(connection_class: type[AbstractConnection]) -> type[AbstractConnection]:
    return type(connection_class.__name__, (_Losing, connection_class), {})
