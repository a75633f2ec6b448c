"""The queue's connections: redis-py's, made for arq."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

from arq.connections import ArqRedis
from redis.asyncio import BlockingConnectionPool
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ReadOnlyError

from deltafan._lua import Script
from deltafan_worker.serialization import deserialize, serialize

MAX_CONNECTIONS = 64


@asynccontextmanager
async def queue_pool(url: str) -> AsyncIterator[ArqRedis]:
    """Connections for the block's time."""
    keepalive = {} if url.startswith("unix:") else {"socket_keepalive": True}
    # Our scripts are safe to repeat, but a WATCH of arq's is not: no retries inside the client.
    connections = BlockingConnectionPool.from_url(
        url,
        max_connections=MAX_CONNECTIONS,
        timeout=5,
        socket_connect_timeout=5,
        socket_timeout=10,
        client_name="deltafan-queue",
        **keepalive,
    )
    connections.connection_class = _losing(connections.connection_class)
    pool = ArqRedis(connections, job_serializer=serialize, job_deserializer=deserialize)
    try:
        yield pool
    finally:
        await pool.aclose(close_connection_pool=True)


async def run_script(pool: ArqRedis, script: Script, keys: Sequence[str], args: Sequence[Any]) -> Any:
    """Run a script of the queue's server, which may not know it yet."""
    try:
        return await cast(Awaitable[Any], pool.evalsha(script.sha.decode(), len(keys), *keys, *args))
    except NoScriptError:
        return await cast(Awaitable[Any], pool.eval(script.source.decode(), len(keys), *keys, *args))


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
