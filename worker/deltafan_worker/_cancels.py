"""Hears that a job's cancellation was requested.

The request itself is in the job's state; this only saves waiting for the heartbeat that would find it.
"""

import asyncio
import logging
from collections.abc import Callable

from deltafan._errors import RedisUnavailable
from deltafan._resp import Reply, RespConnection, open_connection, pack

log = logging.getLogger("deltafan.cancels")

_REOPEN_PAUSE_S = 0.5
_PING_S = 10.0


async def listen_for_cancels(url: str, channel: str, on_cancel: Callable[[str], None]) -> None:
    """Call `on_cancel` with the id of each job whose cancellation is announced; runs until it is cancelled."""
    while True:
        try:
            connection = await open_connection(url, timeout_s=5.0, name="deltafan-cancels")
        except RedisUnavailable as error:
            log.debug("%s", error)
            await asyncio.sleep(_REOPEN_PAUSE_S)
            continue
        try:
            await _listen(connection, channel, on_cancel)
        finally:
            connection.close()


async def _listen(connection: RespConnection, channel: str, on_cancel: Callable[[str], None]) -> None:
    heard = asyncio.Event()

    def on_push(reply: Reply) -> None:
        heard.set()
        if isinstance(reply, list) and reply[0] == b"message":
            on_cancel(reply[2].decode())

    connection.listen(on_push)
    connection.send(pack("SUBSCRIBE", channel), ())
    while not connection.is_lost:
        heard.clear()
        connection.send(pack("PING"), ())
        await asyncio.wait([connection.lost], timeout=_PING_S)
        if not heard.is_set():
            return
