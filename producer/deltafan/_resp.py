"""One pipelined connection to Redis: bytes go out whole, each reply goes to the handler it was sent with.

redis-py opens the connection (URL, TLS, AUTH, SELECT); after that its socket is driven here, without a task and
without an `await` per command. Measured on loopback: redis-py's own client spends 50-110 us of CPU on a command,
this 4-9 us, and a stream of deltas is nothing but small commands.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeAlias, cast

import hiredis
from redis.asyncio.connection import AbstractConnection, Connection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError

from deltafan._errors import RedisUnavailable
from deltafan._lua import Script
from deltafan._url import UNREADABLE, masked_url

Reply: TypeAlias = Any
"""bytes, int, None or a list of replies. A handler may also get a ServerError or a ConnectionLost."""
Handler: TypeAlias = Callable[[Reply], None]
Argument: TypeAlias = str | bytes | int | float

_INCOMPLETE = object()
_SLOW_BYTES_PER_S = 1_000_000
"""So fast a link is that may carry large commands; 8 MiB must pass within a client's patience anyway."""


class ServerError(Exception):
    """The server's error reply to one command."""


_PASSING = ("LOADING", "READONLY", "MASTERDOWN", "NOREPLICAS", "TRYAGAIN", "BUSY ")


def is_passing(error: ServerError) -> bool:
    """Whether a server refuses that is starting, being replaced or held up by a slow script: it may be ready soon."""
    return str(error).startswith(_PASSING) or is_replaced(error)


def is_replaced(error: ServerError) -> bool:
    """Whether a server refuses that is a replica now: it keeps its connections, while its name leads to another."""
    # Before Redis 7 what a script was refused stands in the middle of the script's own error.
    return str(error).startswith(("READONLY", "MASTERDOWN")) or " -READONLY " in str(error)


class ConnectionLost(Exception):
    """The connection ended before the reply came; the command may or may not have run."""


def pack(*args: Argument) -> bytes:
    """One command in the wire format."""
    return cast(bytes, hiredis.pack_command(args))  # type: ignore[arg-type]  # its stub asks for a 1-tuple


def ignore(_reply: Reply) -> None:
    """The handler for replies that tell nothing: a bell that nobody heard, a lifetime that was renewed."""


def raise_error(reply: Reply) -> Reply:
    """Give the reply back unless it is an error."""
    if isinstance(reply, Exception):
        raise reply
    return reply


class RespConnection(asyncio.Protocol):
    """An open connection. Made by `open_connection`; whoever opens it closes it.

    With `silence_s` it is closed when replies are owed and nothing has arrived for so long, and for as long again as
    what was sent may take on a slow link: a firewall may have forgotten the connection, and nobody would ever say so.
    """

    def __init__(self, opened: AbstractConnection, silence_s: float | None = None) -> None:
        # Kept: redis-py's object owns the socket and would close it when collected.
        self._opened = opened
        self._reader = hiredis.Reader(replyError=ServerError, notEnoughData=_INCOMPLETE)
        self._handlers: deque[Handler] = deque()
        self._push: Handler | None = None
        self._put_off: list[bytes] = []
        self.sent_bytes = 0
        """In all, whether they have left already or not."""
        self._silence_s = silence_s
        self._watch: asyncio.TimerHandle | None = None
        self.received_bytes = 0
        """So far: while their number grows the server is alive, whatever it owes."""
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transport = cast(asyncio.Transport, opened._writer.transport)  # type: ignore[union-attr]  # noqa: SLF001  held by a contract test
        self._transport.set_protocol(self)
        # What it has told redis-py's protocol it will not tell ours: that it was cut, or that the server sends no more.
        if self._transport.is_closing() or opened._reader.at_eof():  # type: ignore[union-attr]  # noqa: SLF001
            self.close()

    @property
    def is_lost(self) -> bool:
        """Whether the connection has ended."""
        return self.lost.done()

    def send(self, data: bytes, handlers: Iterable[Handler]) -> None:
        """Write commands as `pack` made them; `handlers` get the replies, one each, in order."""
        self._handlers.extend(handlers)
        self.sent_bytes += len(data)
        self._write(data)

    def put_off(self, data: bytes, handlers: Iterable[Handler]) -> None:
        """Write commands with whatever is sent next, or at the end of this turn of the event loop.

        A write of its own is a system call that wakes the server: 50 us and more.
        """
        self._handlers.extend(handlers)
        self.sent_bytes += len(data)
        if not self._put_off:
            asyncio.get_running_loop().call_soon(self._write)
        self._put_off.append(data)

    def _write(self, data: bytes = b"") -> None:
        if self._put_off:
            data, self._put_off = b"".join([*self._put_off, data]), []
        if self.lost.done():
            self._fail_handlers()
        elif data:
            self._transport.write(data)
            if self._watch is None and self._silence_s is not None:
                self._look_later(self._silence_s, self.sent_bytes - len(data))

    def call(self, *args: Argument) -> asyncio.Future[Reply]:
        """Send one command; the future has its reply, or raises ServerError or ConnectionLost."""
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self.send(pack(*args), (partial(_resolve, future),))
        return future

    def pipeline(self, commands: Sequence[bytes]) -> asyncio.Future[list[Reply]]:
        """Send packed commands in one write; the future has all replies, ServerError instances among them."""
        future: asyncio.Future[list[Reply]] = asyncio.get_running_loop().create_future()
        if not commands:
            future.set_result([])
            return future
        replies: list[Reply] = []

        def collect(reply: Reply) -> None:
            replies.append(reply)
            if future.done():
                return
            if isinstance(reply, ConnectionLost):
                future.set_exception(reply)
            elif len(replies) == len(commands):
                future.set_result(replies)

        self.send(b"".join(commands), [collect] * len(commands))
        return future

    async def run(self, script: Script, keys: Sequence[str], args: Sequence[Argument]) -> Reply:
        """Run a script; one round trip, three when the server does not have it yet."""
        try:
            return await self.call("EVALSHA", script.sha, len(keys), *keys, *args)
        except ServerError as error:
            if not str(error).startswith("NOSCRIPT"):
                raise
        return await self.call("EVAL", script.source, len(keys), *keys, *args)

    def listen(self, push: Handler) -> None:
        """From now on hand everything that arrives to `push`: this is a pub/sub connection."""
        self._push = push

    def close(self) -> None:
        """Drop the connection. Commands without a reply yet fail with ConnectionLost."""
        self._transport.abort()
        self._end()

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        reader, handlers = self._reader, self._handlers
        self.received_bytes += len(data)
        reader.feed(data)
        while (reply := reader.gets()) is not _INCOMPLETE:
            if self._push is not None:
                self._push(reply)
            elif handlers:
                if (handler := handlers.popleft()) is not ignore:
                    handler(reply)
            else:  # closed by a handler meanwhile; or an answer to nothing, after which no other could be told apart
                self.close()
                return

    def eof_received(self) -> None:
        """Called by the event loop."""

    def connection_lost(self, _exc: Exception | None) -> None:
        """Called by the event loop."""
        self._end()

    def _look_later(self, wait_s: float, sent_before: int) -> None:
        now = self.received_bytes, self.sent_bytes
        self._watch = asyncio.get_running_loop().call_later(wait_s, self._look, sent_before, *now)

    def _look(self, sent_before: int, received: int, sent: int) -> None:
        self._watch = None
        if not self._handlers or self._silence_s is None:
            return
        # A large command goes out slowly, from buffers of TLS and the kernel that nobody sees getting empty.
        if self.received_bytes > received:
            self._look_later(self._silence_s, sent)
        elif self.sent_bytes > sent_before:
            self._look_later((self.sent_bytes - sent_before) / _SLOW_BYTES_PER_S, self.sent_bytes)
        else:
            self.close()

    def _end(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if not self.lost.done():
            self.lost.set_result(None)
            # redis-py's object is not to close, or complain of, what is closed.
            self._opened._writer = self._opened._reader = None  # noqa: SLF001
            self._fail_handlers()

    def _fail_handlers(self) -> None:
        error = ConnectionLost("the connection to Redis was lost")
        while self._handlers:
            self._handlers.popleft()(error)


async def open_connection(
    url: str, *, timeout_s: float, name: str = "deltafan", silence_s: float | None = None
) -> RespConnection:
    """Open a connection to the server that `url` names (redis://, rediss://, unix://).

    Raises:
        RedisUnavailable: nobody answers within `timeout_s`, or the server refuses us.
    """
    opened: AbstractConnection | None = None
    try:
        opened = _redis_connection(url, timeout_s, name)
        async with asyncio.timeout(timeout_s):
            await opened.connect()
    # RuntimeError: uvloop, of a transport cut meanwhile. TypeError: an option in the URL that redis-py does not know.
    except (RedisError, OSError, ValueError, RuntimeError, TypeError) as error:
        await _discard(opened)
        raise RedisUnavailable(masked_url(url), _explain(url, error)) from (
            None if masked_url(url) == UNREADABLE else error
        )
    except BaseException:
        await _discard(opened)
        raise
    return RespConnection(opened, silence_s)


def _redis_connection(url: str, timeout_s: float, name: str) -> AbstractConnection:
    options: dict[str, Any] = dict(parse_url(url))
    connection_class = options.pop("connection_class", Connection)
    options.pop("max_connections", None)
    # redis-py 6 and later retry by default, and 8 cuts blocking reads after 5 s: state what we want.
    options |= {
        "client_name": name,
        "protocol": 2,
        "retry": Retry(NoBackoff(), 0),
        "socket_connect_timeout": timeout_s,
        "socket_keepalive": True,
    }
    if connection_class.__name__ == "UnixDomainSocketConnection":
        del options["socket_keepalive"]
    return cast(AbstractConnection, connection_class(**options))


async def _discard(opened: AbstractConnection | None) -> None:
    if opened is not None:
        await opened.disconnect(nowait=True)


def _explain(url: str, error: Exception) -> str:
    if masked_url(url) == UNREADABLE:  # its own words would quote parts of the password
        return "this is no URL of a server; percent-encode what its password holds of /, ?, # and @"
    if isinstance(error, AuthenticationError):
        return f"it refused the credentials ({error})"
    if isinstance(error, TypeError):
        return f"an option of this URL is not known ({error})"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return f"can not be reached ({error})"


def _resolve(future: "asyncio.Future[Reply]", reply: Reply) -> None:
    if future.done():
        return
    if isinstance(reply, Exception):
        future.set_exception(reply)
    else:
        future.set_result(reply)
