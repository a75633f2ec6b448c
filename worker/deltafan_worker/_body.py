"""The rest of a response's body, given to whoever reads it in the very call in which it arrives.

aiohttp's own way, a buffer, a future and a task to be woken for each packet, is a sixth of all that a delta costs which
arrives alone. So its StreamReader is told to pass on what its parser feeds it. That touches what aiohttp does not
document; `tests/contract/test_bodies.py` holds it to that.
"""

import asyncio
from collections.abc import Callable
from typing import Any, TypeAlias

import aiohttp
from aiohttp import StreamReader

Take: TypeAlias = Callable[[bytes], bool]
"""Takes the next bytes; returns whether more are wanted."""


async def read_body(response: aiohttp.ClientResponse, take: Take) -> None:
    """Give `take` what comes, until it wants no more or the body ends. Raises what it raises, and what aiohttp does."""
    content = response.content
    if type(content) is not StreamReader or "Content-Encoding" in response.headers:
        while (data := await content.readany()) and take(data):
            pass
        return
    while data := content.read_nowait():
        if not take(data):
            return
    if not content.is_eof():
        await _Passing(content, take)


class _Passing(asyncio.Future[None]):
    """Done when no more is wanted, or comes. It stands where a reader's future would: aiohttp tells it of the end."""

    def __init__(self, content: StreamReader, take: Take) -> None:
        super().__init__(loop=asyncio.get_running_loop())
        self.take = take
        content.__class__ = _PassingReader
        content._waiter = self  # noqa: SLF001


class _PassingReader(StreamReader):
    """A reader that holds nothing back, so that it is never full."""

    __slots__ = ()

    def feed_data(self, data: bytes, size: int = 0) -> bool:  # noqa: ARG002  the parser's signature
        """Called by the parser."""
        passing: Any = self._waiter
        if data and passing is not None and not passing.done():
            try:
                if not passing.take(data):
                    passing.set_result(None)
            except Exception as error:  # noqa: BLE001  it is for whoever waits; the parser would take it for its own
                passing.set_exception(error)
                passing.exception()  # a task that is cancelled at this moment will not ask for it
        return False

    def begin_http_chunk_receiving(self) -> None:
        """Called by the parser."""

    def end_http_chunk_receiving(self) -> None:
        """Called by the parser."""
