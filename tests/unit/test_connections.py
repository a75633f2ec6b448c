"""What a connection says that was cut at the very moment when it was written to, and when it is given up."""

import asyncio
import socket
import struct
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
import uvloop
from redis.asyncio.connection import Connection
from redis.exceptions import ConnectionError as RedisConnectionError

from deltafan import RedisUnavailable
from deltafan._resp import ConnectionLost, RespConnection, ServerError, is_passing, is_replaced, open_connection, pack
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


@pytest.mark.parametrize("how", ["reset", "closed"])
@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_a_connection_that_is_cut_before_we_have_it_is_lost(
    run: Callable[[Coroutine[Any, Any, None]], None], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its transport has told redis-py, and would tell us nothing: asyncio takes what is written, uvloop raises."""
    connect: Any = Connection.connect

    async def connect_and_be_cut(connection: Connection) -> None:
        await connect(connection)
        writer, reader = connection._writer, connection._reader
        assert writer is not None
        assert reader is not None
        await wait_until(lambda: writer.transport.is_closing() or reader.at_eof(), "the server has cut it")

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(4096)
        if how == "reset":
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.write(b"+OK\r\n" * 8)
        await asyncio.wait([asyncio.ensure_future(reader.read())], timeout=0.2)
        writer.transport.abort()

    async def scene() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            connection = await open_connection(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}", timeout_s=5)
            assert connection.is_lost
            with pytest.raises(ConnectionLost):
                await asyncio.wait_for(connection.call("PING"), 5)

    monkeypatch.setattr(Connection, "connect", connect_and_be_cut)
    run(scene())


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
    """A socket that takes what it is given, and hears nothing."""

    def set_protocol(self, _protocol: object) -> None: ...

    def is_closing(self) -> bool:
        return False

    def __init__(self) -> None:
        self.writes: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.writes.append(data)

    def abort(self) -> None: ...


def connect(transport: Transport) -> RespConnection:
    opened: Any = SimpleNamespace(
        _writer=SimpleNamespace(transport=transport), _reader=SimpleNamespace(at_eof=lambda: False)
    )
    return RespConnection(opened, silence_s=0.01)


async def test_large_commands_have_time_to_go_out_before_they_are_taken_for_silence() -> None:
    connection, clock = connect(Transport()), asyncio.get_running_loop().time
    started_s = clock()
    first, second = (connection.call("SET", "key", "x" * 100_000) for _ in range(2))
    for answer in (first, second):
        with pytest.raises(ConnectionLost):
            await asyncio.wait_for(answer, 5)
    assert clock() - started_s > 0.2, "at a megabyte per second"


@pytest.mark.parametrize("is_followed", [True, False])
async def test_what_is_put_off_goes_out_in_its_order_with_the_next_command_or_with_the_turn(is_followed: bool) -> None:
    transport, replies = Transport(), list[Any]()
    connection = connect(transport)
    connection.put_off(b"first ", [replies.append])
    connection.put_off(b"second ", [replies.append])
    if is_followed:
        connection.send(b"third", [replies.append])
        assert transport.writes == [b"first second third"]
    else:
        assert transport.writes == []
        await wait_until(lambda: transport.writes == [b"first second "], "the turn is over")
    connection.data_received(b"+1\r\n+2\r\n")
    assert replies == [b"1", b"2"]
    connection.close()


async def test_what_is_put_off_when_the_connection_is_lost_is_lost_with_it() -> None:
    transport, replies = Transport(), list[Any]()
    connection = connect(transport)
    connection.put_off(b"before", [replies.append])
    connection.close()
    connection.put_off(b"behind", [replies.append])
    await wait_until(lambda: len(replies) == 2, "both are told")
    assert [type(reply) for reply in replies] == [ConnectionLost] * 2
    assert transport.writes == []


async def test_a_reply_that_arrives_slowly_is_no_silence() -> None:
    connection = connect(Transport())
    answer = connection.call("GET", "key")
    connection.data_received(b"$9\r\nhalf")
    connection._look(0, 0, 0)
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


@pytest.mark.parametrize(
    "text",
    [
        "READONLY You can't write against a read only replica.",
        "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
        "ERR Error running script (call to f_0): @user_script:1: -READONLY You can't write against a replica.",
    ],
)
def test_a_server_that_is_a_replica_now_says_so_also_of_a_script(text: str) -> None:
    """The last is how servers before Redis 7 say it."""
    assert is_replaced(ServerError(text))
    assert is_passing(ServerError(text)), "a client waits for its successor"
    assert not is_replaced(ServerError("ERR unknown command 'READONLY'"))
