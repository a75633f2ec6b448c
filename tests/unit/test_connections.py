"""What a connection says that was cut at the very moment when it was written to."""

from typing import Any

import pytest
from redis.asyncio.connection import Connection
from redis.exceptions import ConnectionError as RedisConnectionError

from deltafan import RedisUnavailable
from deltafan._resp import open_connection
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
