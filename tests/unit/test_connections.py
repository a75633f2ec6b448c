"""What a connection says that was cut at the very moment when it was written to, and when it is given up."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from redis.asyncio.connection import Connection
from redis.exceptions import ConnectionError as RedisConnectionError

from deltafan import RedisUnavailable
from deltafan._resp import ConnectionLost, RespConnection, open_connection, pack
from deltafan_worker._queue_pool import _losing
from support.waiting import wait_until

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


class Transport:
    """A socket that takes what it is given as slowly as a test says, and hears nothing."""

    def __init__(self, *unsent: int) -> None:
        self._unsent = iter(unsent)
        self.left = 0

    def set_protocol(self, _protocol: object) -> None: ...

    def write(self, _data: bytes) -> None: ...

    def abort(self) -> None: ...

    def get_write_buffer_size(self) -> int:
        self.left = next(self._unsent, self.left)
        return self.left


def connect(transport: Transport) -> RespConnection:
    opened: Any = SimpleNamespace(_writer=SimpleNamespace(transport=transport), _reader=None)
    return RespConnection(opened, silence_s=0.01)


async def test_a_large_command_that_goes_out_slowly_is_not_taken_for_silence() -> None:
    sizes = [9_000_000, 8_000_000, 8_000_000, 7_000_000, 7_000_000, 1, 1]
    transport = Transport(*sizes, 1)
    connection = connect(transport)
    with pytest.raises(ConnectionLost):
        await asyncio.wait_for(connection.call("SET", "key", "long"), 5)
    assert transport.left == 1, "it was given up when nothing moved any more"


async def test_a_reply_that_arrives_slowly_is_no_silence() -> None:
    connection = connect(Transport())
    answer = connection.call("GET", "key")
    connection.data_received(b"$9\r\nhalf")
    connection._look(60, 0, 0)
    connection.data_received(b" text\r\n")
    assert await answer == b"half text"
    connection.close()


async def test_nothing_owed_is_no_silence() -> None:
    connection = connect(Transport())
    answer = connection.call("PING")
    connection.data_received(b"+PONG\r\n")
    assert await answer == b"PONG"
    await wait_until(lambda: connection._watch is None, "it has been looked at")
    assert not connection.is_lost
    connection.close()
