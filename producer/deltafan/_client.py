"""A Redis client over one pipelined connection that reopens itself."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Self, TypeAlias, TypeVar

from deltafan._errors import RedisUnavailable
from deltafan._lua import Script
from deltafan._resp import (
    Argument,
    ConnectionLost,
    Reply,
    RespConnection,
    ServerError,
    is_passing,
    open_connection,
    pack,
    raise_error,
)
from deltafan._url import masked_url

T = TypeVar("T")
ScriptCall: TypeAlias = tuple[Sequence[str], Sequence[Argument]]
"""Keys and arguments of one call of a script."""

_RETRY_PAUSE_S = 0.05
_PATIENCE_S = 10.0
_SILENCE_S = 3.0


class RedisClient:
    """Sends commands and scripts, again when the connection breaks before their reply.

    So everything sent through it must be safe to repeat, which every script of ours is. The first connection is
    made on entering, and fails within `connect_timeout_s`; later a lost server is waited for, for 10 s. A connection
    that says nothing for some seconds is replaced before that. `replicas`: how many must have what `run_durably`
    writes, within `replicas_timeout_ms`.
    """

    def __init__(
        self,
        url: str,
        *,
        connect_timeout_s: float = 1.0,
        patience_s: float = _PATIENCE_S,
        replicas: int = 0,
        replicas_timeout_ms: int = 0,
    ) -> None:
        self.url = url
        self._connect_timeout_s = connect_timeout_s
        self._replicas = replicas
        self._replicas_timeout_ms = replicas_timeout_ms
        # A server that waits for its replicas is silent meanwhile.
        self._patience_s = patience_s + replicas_timeout_ms / 1000
        self._silence_s = _SILENCE_S + replicas_timeout_ms / 1000
        self._connection: RespConnection | None = None
        self._opening = asyncio.Lock()
        self._closed = False

    async def __aenter__(self) -> Self:
        self._connection = await self._connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        self._drop()

    async def run(self, script: Script, keys: Sequence[str], args: Sequence[Argument]) -> Reply:
        """Run a script. One round trip."""
        return await self._repeat(lambda connection: connection.run(script, keys, args))

    async def run_many(self, script: Script, calls: Sequence[ScriptCall], *more: bytes) -> list[Reply]:
        """Run a script for each of `calls`, and packed commands behind them on the same connection.

        One round trip, or three when the server does not have the script yet.
        """
        return await self._repeat(lambda connection: _run_many(connection, script, calls, more))

    async def run_durably(self, script: Script, calls: Sequence[ScriptCall]) -> list[Reply]:
        """Run a script for each of `calls`, and on the same connection wait until the replicas have what it wrote."""
        if self._replicas == 0 or not calls:
            return await self.run_many(script, calls) if calls else []
        *answers, heard = await self.run_many(script, calls, pack("WAIT", self._replicas, self._replicas_timeout_ms))
        if heard < self._replicas:
            within = f"within {self._replicas_timeout_ms} ms"
            why = f"only {heard} of {self._replicas} replicas had the write {within}"
            raise RedisUnavailable(masked_url(self.url), why)
        return answers

    async def call(self, *args: Argument) -> Reply:
        """Run one command. One round trip."""
        return await self._repeat(lambda connection: connection.call(*args))

    async def pipeline(self, commands: Sequence[bytes]) -> list[Reply]:
        """Run packed commands in one round trip; all of them again when one is refused for the moment."""
        return await self._repeat(lambda connection: _pipeline(connection, commands))

    async def _repeat(self, send: Callable[[RespConnection], Awaitable[T]]) -> T:
        try:
            async with asyncio.timeout(self._patience_s):
                while True:
                    connection = await self._open()
                    try:
                        return await send(connection)
                    except ConnectionLost:
                        await asyncio.sleep(_RETRY_PAUSE_S)
                    except ServerError as error:
                        if not is_passing(error):
                            raise
                        connection.close()
                        await asyncio.sleep(_RETRY_PAUSE_S)
        except TimeoutError:
            raise RedisUnavailable(masked_url(self.url), f"no answer within {self._patience_s:g} s") from None
        except ServerError as error:
            raise RedisUnavailable(masked_url(self.url), f"it refused a command ({error})") from error

    async def _open(self) -> RespConnection:
        async with self._opening:
            while True:
                if self._closed:  # perhaps while a connection was being opened
                    self._drop()
                    raise RuntimeError("this client is closed: use it inside its `async with` block")
                if self._connection is not None and not self._connection.is_lost:
                    return self._connection
                try:
                    self._connection = await self._connect()
                except RedisUnavailable:
                    await asyncio.sleep(_RETRY_PAUSE_S)

    async def _connect(self) -> RespConnection:
        return await open_connection(self.url, timeout_s=self._connect_timeout_s, silence_s=self._silence_s)

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


async def _pipeline(connection: RespConnection, commands: Sequence[bytes]) -> list[Reply]:
    return [raise_error(reply) for reply in await connection.pipeline(commands)]


async def _run_many(
    connection: RespConnection, script: Script, calls: Sequence[ScriptCall], more: Sequence[bytes]
) -> list[Reply]:
    commands = [*(pack("EVALSHA", script.sha, len(keys), *keys, *args) for keys, args in calls), *more]
    replies = await connection.pipeline(commands)
    if any(isinstance(reply, ServerError) and str(reply).startswith("NOSCRIPT") for reply in replies):
        await connection.call("SCRIPT", "LOAD", script.source)
        replies = await connection.pipeline(commands)
    return [raise_error(reply) for reply in replies]
