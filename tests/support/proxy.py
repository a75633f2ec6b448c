"""A TCP proxy on loopback whose connections tests cut, hold and slow down, byte for byte where they want to."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from deltafan.testing import simulated_delay

_READ_BYTES = 65_536


@dataclass(frozen=True, slots=True, eq=False)
class _Link:
    """A client's connection and ours to the server."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter

    def cut(self) -> None:
        """What has not been sent is lost, as it is when a network breaks."""
        self.client.transport.abort()
        self.server.transport.abort()

    def close(self) -> None:
        """What has been taken is still passed on."""
        self.client.close()
        self.server.close()


class TcpProxy:
    """Everything is passed on at once until a test says otherwise."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._links: set[_Link] = set()
        self._forgotten: set[_Link] = set()
        self._handlers: set[asyncio.Task[None]] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._reply_bytes_left: int | None = None
        self.port = 0
        self.accepted = 0
        """Connections so far."""
        self.refuses = False
        """New connections are closed at once, as by a server that is going down."""
        self.delay_s = 0.0
        """Every piece, either way, is passed on this much later."""
        self.bytes_per_s: float | None = None
        """How fast what clients send is passed on, as by a slow link; None is at once."""

    @property
    def url(self) -> str:
        """Where a Redis client finds the server through this proxy."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def open(self) -> int:
        """Connections now."""
        return len(self._links)

    def retarget(self, port: int, *, cut: bool = True) -> None:
        """Lead new connections to another server on the same host, as a failover does; old ones are cut, or left."""
        self._target = (self._target[0], port)
        if cut:
            self.cut()

    def cut(self) -> None:
        """Break all connections; new ones are welcome."""
        for link in self._links:
            link.cut()

    def cut_after_reply_bytes(self, count: int) -> None:
        """Pass on `count` more bytes of replies, over all connections, then close the one that has the next.

        With 0 the server executes the next command and its client never learns it. Holds once.
        """
        self._reply_bytes_left = count

    @property
    def is_about_to_cut(self) -> bool:
        """Whether that is still to come."""
        return self._reply_bytes_left is not None

    def forget(self) -> None:
        """Swallow whatever is sent over the connections that are open now, as a forgetful firewall does."""
        self._forgotten |= self._links

    def pause(self) -> None:
        """Hold whatever is sent, either way; connections stay open."""
        self._flowing.clear()

    def resume(self) -> None:
        """Pass on what was held, and what follows."""
        self._flowing.set()

    async def handle(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        """One connection, from accept to the end of both its directions; `asyncio.start_server` makes the task."""
        handler = asyncio.current_task()
        assert handler is not None
        self._handlers.add(handler)
        self.accepted += 1
        try:
            if self.refuses:
                return
            with suppress(OSError):
                from_server, to_server = await asyncio.open_connection(*self._target)
                await self._link(from_client, to_client, from_server, to_server)
        finally:
            to_client.close()
            self._handlers.discard(handler)

    async def end(self) -> None:
        """Break what is still open and wait for it to be gone."""
        self.cut()
        if self._handlers:
            await asyncio.wait(self._handlers, timeout=1)
        handlers = list(self._handlers)
        for handler in handlers:
            handler.cancel()
        await asyncio.gather(*handlers, return_exceptions=True)

    async def _link(
        self,
        from_client: asyncio.StreamReader,
        to_client: asyncio.StreamWriter,
        from_server: asyncio.StreamReader,
        to_server: asyncio.StreamWriter,
    ) -> None:
        link = _Link(to_client, to_server)
        self._links.add(link)
        try:
            async with asyncio.TaskGroup() as directions:
                directions.create_task(self._pass_on(from_client, to_server, link, replies=False))
                directions.create_task(self._pass_on(from_server, to_client, link, replies=True))
        finally:
            self._links.discard(link)
            self._forgotten.discard(link)
            link.close()

    async def _pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, link: _Link, *, replies: bool
    ) -> None:
        try:
            while data := await reader.read(_READ_BYTES):
                if self.delay_s:
                    await simulated_delay(self.delay_s)
                if self.bytes_per_s is not None and not replies:
                    await simulated_delay(len(data) / self.bytes_per_s)
                await self._flowing.wait()
                if link in self._forgotten:
                    continue
                passed = self._within_limit(data) if replies else data
                writer.write(passed)
                await writer.drain()
                if len(passed) < len(data):
                    link.close()
                    return
            # Half closed: the other direction may still have something to say.
            if not writer.transport.is_closing():
                writer.write_eof()
        except (OSError, RuntimeError):  # the latter is uvloop's for a transport that is closed
            link.cut()

    def _within_limit(self, reply: bytes) -> bytes:
        if self._reply_bytes_left is None:
            return reply
        passed = reply[: self._reply_bytes_left]
        self._reply_bytes_left = self._reply_bytes_left - len(passed) if len(passed) == len(reply) else None
        return passed


@asynccontextmanager
async def tcp_proxy(port: int, host: str = "127.0.0.1") -> AsyncIterator[TcpProxy]:
    """A proxy in front of this server for the block's time; its connections end with it."""
    proxy = TcpProxy(host, port)
    server = await asyncio.start_server(proxy.handle, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        await proxy.end()
        await server.wait_closed()
