"""The rest of a response's body, given to whoever reads it in the very call in which it arrives.

aiohttp's own way, a buffer, a future and a task to be woken for each packet, is a sixth of all that a delta costs which
arrives alone, and its parser another tenth. So its StreamReader is told to pass on what the parser feeds it, and a
packet that is one whole chunk, as most are, goes around the parser. That touches what aiohttp does not document:
versions that `tests/contract/test_bodies.py` has not held are read as documented.
"""

import asyncio
import re
from collections.abc import Callable
from typing import Any, TypeAlias

import aiohttp
from aiohttp import StreamReader

Take: TypeAlias = Callable[[bytes], bool]
"""Takes the next bytes; returns whether more are wanted. What has arrived already comes all the same."""

_CLOSED = "the connection was closed in mid-body"
_IS_HELD = aiohttp.__version__.startswith("3.14.")
_CHUNK_HEAD = re.compile(rb"([0-9a-fA-F]{1,8})\r\n")


async def read_body(response: aiohttp.ClientResponse, take: Take) -> None:
    """Give `take` what comes, until it wants no more or the body ends. Raises what it raises, and what aiohttp does.

    Only the caller's timeouts hold: not those that aiohttp's session may have for reading.
    """
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
    protocol: Any = None if response.connection is None else response.connection.protocol
    # Of framing that breaks in mid-body aiohttp tells nobody: its parser has forgotten the reader by then.
    closed = None if protocol is None else protocol.closed
    transport = None if protocol is None else protocol.transport
    if closed is None or transport is None:
        raise aiohttp.ClientPayloadError(_CLOSED)
    passing = _Passing(response.content, protocol, take)
    closed.remove_done_callback(_hear)  # once, however many responses the connection serves
    closed.add_done_callback(_hear)
    closed.add_done_callback(passing.on_closed)
    transport.set_protocol(passing)
    try:
        await passing
    finally:  # a connection that is kept would keep the answer
        closed.remove_done_callback(passing.on_closed)
        if not transport.is_closing():
            transport.set_protocol(protocol)


def _hear(closed: "asyncio.Future[None]") -> None:
    """Else it complains that nobody has asked for its error."""
    if not closed.cancelled():
        closed.exception()


class _Passing(asyncio.Future[None]):
    """Done when no more is wanted, or comes. It stands in two places, before aiohttp's protocol and behind its parser.

    There, where a reader's future would, so that aiohttp tells it of the end.
    """

    def __init__(self, content: Any, protocol: Any, take: Take) -> None:
        super().__init__(loop=asyncio.get_running_loop())
        self.is_between_chunks = False
        """As the parser last told: not before it has seen a chunk's end."""
        self._protocol = protocol
        self._take = take
        self.connection_lost, self.eof_received = protocol.connection_lost, protocol.eof_received
        self.pause_writing, self.resume_writing = protocol.pause_writing, protocol.resume_writing
        content.__class__, content._waiter = _PassingReader, self  # noqa: SLF001

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        if self.is_between_chunks and (head := _CHUNK_HEAD.match(data)) is not None:
            start, size = head.end(), int(head[1], 16)
            if size > 0 and len(data) == start + size + 2 and data.endswith(b"\r\n"):
                self.give(data[start:-2])
                return
        self._protocol.data_received(data)
        # Else it has the beginning of a chunk's head.
        self.is_between_chunks = self.is_between_chunks and data.endswith(b"\r\n")

    def give(self, data: bytes) -> None:
        """Pass on a piece of the body."""
        if self.done():
            return
        try:
            if not self._take(data):
                self.get_loop().call_soon(self._settle)
        except Exception as error:  # noqa: BLE001  it is for whoever waits; the parser would take it for its own
            self.set_exception(error)
            self.exception()  # a task that is cancelled at this moment will not ask for it

    def _settle(self) -> None:
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
        if data and passing is not None:
            passing.give(data)
        return False

    def begin_http_chunk_receiving(self) -> None:
        """Called by the parser."""
        self._note_chunk(between=False)

    def end_http_chunk_receiving(self) -> None:
        """Called by the parser."""
        self._note_chunk(between=True)

    def _note_chunk(self, *, between: bool) -> None:
        passing: Any = self._waiter
        if passing is not None:
            passing.is_between_chunks = between
