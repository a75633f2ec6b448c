"""What a connection says that was cut at the very moment when it was written to."""

import asyncio
from typing import Any

import pytest
from redis.asyncio.connection import Connection
from redis.exceptions import ConnectionError as RedisConnectionError

from deltafan import RedisUnavailable
from deltafan._resp import open_connection, pack
from deltafan_worker._queue_pool import _losing

CLOSED = RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")
"""uvloop's words. redis-py passes them on, and a worker that waits for its server must not die of them."""


async def test_while_it_is_opened_the_server_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    async def connect(_self: Connection) -> None:
        raise CLOSED

    monkeypatch.setattr(Connection, "connect", connect)
    with pytest.raises(RedisUnavailable, match="closed"):
        await open_connection("redis://127.0.0.1:1/0", timeout_s=1)


async def test_while_a_command_is_sent_it_is_lost() -> None:
    class Cut:
        async def send_packed_command(self, *_args: Any, **_options: Any) -> None:
            raise CLOSED

    connection: Any = _losing(Cut)()  # type: ignore[arg-type]
    with pytest.raises(RedisConnectionError, match="closed"):
        await connection.send_packed_command(b"PING")


async def test_an_answer_behind_the_one_that_closed_the_connection_is_nobodys() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.read(4096):
                writer.write(b"+OK\r\n" * 8)
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    problems: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: problems.append(context))
    async with server:
        connection = await open_connection(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}", timeout_s=5)
        connection.send(pack("PING"), (lambda _reply: connection.close(),))
        await connection.lost
    assert not problems
