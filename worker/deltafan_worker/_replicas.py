"""Whether a job's end has reached the replicas, one of which may be promoted.

On a connection of its own: a WAIT holds up whatever comes behind it. All who ask at one time share one WAIT.
"""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress

from deltafan._errors import RedisUnavailable
from deltafan._lua import load
from deltafan._resp import ConnectionLost, Reply, RespConnection, ServerError, open_connection

log = logging.getLogger("deltafan.publisher")

CONFIRM = load("confirm", "deltafan_worker")
_TRIES = 20
_GRACE_S = 2.0
"""A connection that is silent for so much longer than its WAIT may take is lost."""
_RETRY_PAUSE_S = 0.2


class Replicas:
    """Asks for `count` replicas; `keep_asking` runs beside everything that uses it."""

    def __init__(self, url: str, count: int, timeout_ms: int) -> None:
        self._url = url
        self._count = count
        self._timeout_ms = timeout_ms
        self._asked: list[tuple[Sequence[str], asyncio.Future[tuple[bool, int]]]] = []
        self._wake = asyncio.Event()

    async def have_end(self, keys: Sequence[str]) -> bool | None:
        """Whether the job's end, just written, still stands and has reached the replicas.

        None when that can not be told within a bounded time: a fleet must not hang on a replica that is gone.
        """
        if self._count == 0:
            return True
        with suppress(TimeoutError):
            async with asyncio.timeout(_TRIES * self._timeout_ms / 1000 + _GRACE_S):
                for _ in range(_TRIES):
                    stands, heard = await self._ask(keys)
                    if not stands or heard >= self._count:
                        return stands
        log.warning("%s: fewer than %d replicas have the end of this job; going on", keys[1], self._count)
        return None

    def _ask(self, keys: Sequence[str]) -> "asyncio.Future[tuple[bool, int]]":
        answer: asyncio.Future[tuple[bool, int]] = asyncio.get_running_loop().create_future()
        self._asked.append((keys, answer))
        self._wake.set()
        return answer

    async def keep_asking(self) -> None:
        """Answer whoever asks; runs until cancelled."""
        while True:
            await self._wake.wait()
            try:
                connection = await open_connection(self._url, timeout_s=5.0, name="deltafan-replicas")
            except RedisUnavailable as error:
                log.debug("%s", error)
                await asyncio.sleep(_RETRY_PAUSE_S)
                continue
            try:
                while await self._ask_once(connection):
                    pass
            finally:
                connection.close()

    async def _ask_once(self, connection: RespConnection) -> bool:
        """Answer all who ask now. Returns whether the connection is still good; a lost one has proved nothing."""
        await self._wake.wait()
        self._wake.clear()
        asked, self._asked = self._asked, []
        stand, heard = [False] * len(asked), 0
        try:
            async with asyncio.timeout(self._timeout_ms / 1000 + _GRACE_S):
                confirms = (connection.run(CONFIRM, keys, ()) for keys, _ in asked)
                replies = await asyncio.gather(*confirms, return_exceptions=True)
                stand = [reply == 1 for reply in replies]
                heard = _number(await connection.call("WAIT", self._count, self._timeout_ms))
        except ServerError as error:  # its user may not ask, or it is a replica now: then its name leads to another
            log.debug("WAIT was refused: %s", error)
            await asyncio.sleep(_RETRY_PAUSE_S)
        except (ConnectionLost, TimeoutError):
            pass
        else:
            return True
        finally:
            for (_, answer), stands in zip(asked, stand, strict=True):
                if not answer.done():
                    answer.set_result((stands, heard))
        return False


def _number(reply: Reply) -> int:
    return reply if isinstance(reply, int) else 0
