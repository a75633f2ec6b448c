"""The rest of a response's body, given to whoever reads it in the very call in which it arrives.

aiohttp's own way, a buffer, a future and a task to be woken for each packet, is a sixth of all that a delta costs which
arrives alone. So its StreamReader is told to pass on what its parser feeds it. That touches what aiohttp does not
document: versions that `tests/contract/test_bodies.py` has not held are read as documented.
"""

import asyncio
from collections.abc import Callable
from typing import Any, TypeAlias

import aiohttp
from aiohttp import StreamReader

Take: TypeAlias = Callable[[bytes], bool]
"""Takes the next bytes; returns whether more are wanted. What has arrived already comes all the same."""

_CLOSED = "the connection was closed in mid-body"
_IS_HELD = aiohttp.__version__.startswith("3.14.")


async def read_body(response: aiohttp.ClientResponse, take: Take) -> None:
    """Give `take` what comes, until it wants no more or the body ends. Raises what it raises, and what aiohttp does."""
    content = response.content
    if not _IS_HELD or type(content) is not StreamReader or "Content-Encoding" in response.headers:
        while (data := await content.readany()) and take(data):
            pass
        return
    while data := content.read_nowait():
        if not take(data):
            return
    if not content.is_eof():
        await _pass_on(response, take)


async def _pass_on(response: aiohttp.ClientResponse, take: Take) -> None:
    # Of framing that breaks in mid-body aiohttp tells nobody: its parser has forgotten the reader by then.
    closed = None if response.connection is None else response.connection.protocol.closed  # type: ignore[union-attr]
    if closed is None:
        raise aiohttp.ClientPayloadError(_CLOSED)
    passing = _Passing(response.content, take)
    closed.remove_done_callback(_hear)  # once, however many responses the connection serves
    closed.add_done_callback(_hear)
    closed.add_done_callback(passing.on_closed)
    try:
        await passing
    finally:  # a connection that is kept would keep the answer
        closed.remove_done_callback(passing.on_closed)


def _hear(closed: "asyncio.Future[None]") -> None:
    """Else it complains that nobody has asked for its error."""
    if not closed.cancelled():
        closed.exception()


class _Passing(asyncio.Future[None]):
    """Done when no more is wanted, or comes. It stands where a reader's future would: aiohttp tells it of the end."""

    def __init__(self, content: Any, take: Take) -> None:
        super().__init__(loop=asyncio.get_running_loop())
        self.take = take
        content.__class__, content._waiter = _PassingReader, self  # noqa: SLF001

    def settle(self) -> None:
        """Nothing more is wanted."""
        if not self.done():
            self.set_result(None)

    def on_closed(self, _closed: "asyncio.Future[None]") -> None:
        """Nothing more can come."""
        if not self.done():
            self.set_exception(aiohttp.ClientPayloadError(_CLOSED))


class _PassingReader(StreamReader):
    """A reader that holds nothing back, so that it is never full."""

    __slots__ = ()

    def feed_data(self, data: bytes, size: int = 0) -> bool:  # noqa: ARG002  the parser's signature
        """Called by the parser."""
        passing: Any = self._waiter
        if data and passing is not None and not passing.done():
            try:
                if not passing.take(data):
                    passing.get_loop().call_soon(passing.settle)
            except Exception as error:  # noqa: BLE001  it is for whoever waits; the parser would take it for its own
                passing.set_exception(error)
                passing.exception()  # a task that is cancelled at this moment will not ask for it
        return False

    def begin_http_chunk_receiving(self) -> None:
        """Called by the parser."""

    def end_http_chunk_receiving(self) -> None:
        """Called by the parser."""
