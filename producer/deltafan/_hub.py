"""The hub: all readers of a process over two connections, however many jobs and readers there are.

One connection is subscribed to the bells of the jobs that are read, the other reads what rang. A bell is a hint and
the stream is the truth: a sweep every few seconds finds what a lost bell left unread and what no read ever reports,
a key that is gone. Reads go out in rounds, the next when the last has been answered, so under load they batch
themselves and nobody waits for a timer.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Protocol

from deltafan._background import background
from deltafan._errors import RedisUnavailable
from deltafan._resp import (
    ConnectionLost,
    Handler,
    Reply,
    ServerError,
    ignore,
    is_passing,
    open_connection,
    pack,
    raise_error,
)
from deltafan._url import masked_url

log = logging.getLogger("deltafan")

SWEEP_S = 5.0
"""How long a lost bell delays a reader, or a vanished key goes unnoticed; twice as long while many come and go."""
SWEEP_PORTION = 16
"""Jobs that are looked at together: 250 at once, with four commands each, hold everybody up for 20 ms and more."""
PATIENCE_S = 10.0
"""How long a question waits for a server that went away."""
_REOPEN_PAUSE_S = 0.2


class Listener(Protocol):
    """Somebody who wants to know when a job's stream changes."""

    def on_bell(self, status: bytes, /) -> None:
        """The stream has grown. `status` is empty, or how the job ended."""

    def on_sweep(self) -> None:
        """Time to look for anything that was missed: every few seconds, and after every reconnect."""

    def on_failure(self, error: Exception, /) -> None:
        """There will be no more bells and no more sweeps."""


class _Channel:
    """Who listens to one channel, and how often; whether the server has confirmed the subscription."""

    def __init__(self) -> None:
        self.listeners: Counter[Listener] = Counter()
        self.confirmed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def confirm(self, error: Exception | None = None) -> None:
        """The server has answered the subscription."""
        if not self.confirmed.done():
            if error is None:
                self.confirmed.set_result(None)
            else:
                self.confirmed.set_exception(error)
                self.confirmed.exception()  # seen: perhaps nobody waits for it any more


class Hub:
    """Two connections, kept open; made by `open_hub`."""

    def __init__(self, url: str, connect_timeout_s: float) -> None:
        self._url = url
        self._connect_timeout_s = connect_timeout_s
        self._channels: dict[bytes, _Channel] = {}
        self._requests: list[tuple[bytes, int, Callable[[list[Reply] | None], None]]] = []
        self._unanswered = 0
        self._round_scheduled = False
        self._must_subscribe = False
        self._failure: Exception | None = None

    @property
    def shown_url(self) -> str:
        """The server, for messages."""
        return masked_url(self._url)

    async def open(self) -> None:
        """Open both connections and subscribe to what is listened to.

        Raises:
            RedisUnavailable: the server can not be reached.
        """
        bells = await open_connection(self._url, timeout_s=self._connect_timeout_s, name="deltafan-bells")
        try:
            reads = await open_connection(self._url, timeout_s=self._connect_timeout_s, name="deltafan-reads")
        except BaseException:
            bells.close()
            raise
        bells.listen(self._on_push)
        self._bells, self._reads, self._unanswered = bells, reads, 0
        self._subscribe()

    def close(self) -> None:
        """Drop both connections."""
        self._bells.close()
        self._reads.close()

    def fail(self, error: Exception) -> None:
        """Tell everybody who reads or waits that nothing more will come."""
        self._failure = error
        for channel in tuple(self._channels.values()):
            channel.confirm(error)
            for listener in tuple(channel.listeners):
                listener.on_failure(error)
        requests, self._requests = self._requests, []
        for _, _, handler in requests:
            handler(None)

    @asynccontextmanager
    async def listening(self, name: str, listener: Listener) -> AsyncIterator[None]:
        """Deliver a channel's bells to `listener` within the block; every bell rung after entering is delivered.

        A listener may enter for the same channel several times; it is told of each bell once.
        """
        if self._failure is not None:
            raise self._failure
        key = name.encode()
        channel = self._channels.get(key)
        if channel is None:
            channel = self._channels[key] = _Channel()
            self._bells.send(pack("SUBSCRIBE", key), ())
        channel.listeners[listener] += 1
        try:
            await asyncio.shield(channel.confirmed)
            yield
        finally:
            channel.listeners[listener] -= 1
            if channel.listeners[listener] == 0:
                del channel.listeners[listener]
            if not channel.listeners:
                del self._channels[key]
                if not self._bells.is_lost:
                    self._bells.send(pack("UNSUBSCRIBE", key), ())

    def read(self, commands: Sequence[bytes], handler: Callable[[list[Reply] | None], None]) -> None:
        """Send packed commands with the next round; `handler` gets their replies, or None when the connection broke."""
        self._requests.append((b"".join(commands), len(commands), handler))
        if self._unanswered == 0 and not self._round_scheduled:
            self._round_scheduled = True
            asyncio.get_running_loop().call_soon(self._start_round)

    async def ask(self, *commands: bytes, for_ever: bool = False) -> list[Reply]:
        """Replies to packed commands; repeated when the connection breaks before they come.

        Raises:
            RedisUnavailable: no answer within PATIENCE_S; but `for_ever` waits as a tail does.
        """
        try:
            async with asyncio.timeout(None if for_ever else PATIENCE_S):
                while self._failure is None:
                    future: asyncio.Future[list[Reply] | None] = asyncio.get_running_loop().create_future()
                    self.read(commands, partial(_settle, future))
                    replies = await future
                    if replies is not None and not any(_is_passing(reply) for reply in replies):
                        return [raise_error(reply) for reply in replies]
                    await asyncio.sleep(_REOPEN_PAUSE_S)
                raise self._failure
        except TimeoutError:
            raise RedisUnavailable(masked_url(self._url), f"no answer within {PATIENCE_S:g} s") from None
        except ServerError as error:
            raise RedisUnavailable(masked_url(self._url), f"it refused a command ({error})") from error

    async def keep_open(self) -> None:
        """Sweep, and reopen the connections when they break; runs until it is cancelled."""
        try:
            await self._keep_open()
        except Exception as error:
            log.exception("the reader of Redis at %s has failed", self.shown_url)
            self.fail(error)
            raise

    async def _keep_open(self) -> None:
        while True:
            await self._sweep_until_lost()
            self.close()
            log.warning("Redis at %s: connection lost, readers wait for it", masked_url(self._url))
            await self._reopen()
            log.info("Redis at %s: connected again, readers go on", masked_url(self._url))

    async def _sweep_until_lost(self) -> None:
        """Sweep again and again; return when a connection is lost, or has said nothing for a whole sweep."""
        while True:
            both = (self._bells, self._reads)
            # A PING may be answered behind a page that takes long to arrive: whatever arrives is a sign of life.
            received = [connection.received_bytes for connection in both]
            self._reads.send(pack("PING"), [ignore])
            self._bells.send(pack("PING"), ())
            names = tuple(self._channels)
            portions = [names[at : at + SWEEP_PORTION] for at in range(0, len(names), SWEEP_PORTION)] or [()]
            for portion in portions:
                lost = [connection.lost for connection in both]
                await asyncio.wait(lost, timeout=SWEEP_S / len(portions), return_when=asyncio.FIRST_COMPLETED)
                if self._bells.is_lost or self._reads.is_lost:
                    return
                self._sweep(portion)
            self._sweep(tuple(self._channels.keys() - names))  # whoever has come meanwhile
            if self._must_subscribe:
                self._subscribe()
            if any(connection.received_bytes == before for connection, before in zip(both, received, strict=True)):
                return

    async def _reopen(self) -> None:
        said = ""
        while True:
            await asyncio.sleep(_REOPEN_PAUSE_S)
            try:
                await self.open()
                break
            except RedisUnavailable as error:
                if str(error) != said:
                    log.warning("%s; readers wait for it", error)
                said = str(error)
        self._sweep(tuple(self._channels))

    def _subscribe(self) -> None:
        self._must_subscribe = False
        if self._channels:
            self._bells.send(pack("SUBSCRIBE", *self._channels), ())

    def _sweep(self, names: Sequence[bytes]) -> None:
        for name in names:
            if (channel := self._channels.get(name)) is not None:
                for listener in tuple(channel.listeners):
                    listener.on_sweep()

    def _on_push(self, reply: Reply) -> None:
        if _is_passing(reply):  # a PING or a subscription; which one it does not say
            self._must_subscribe = True
            return
        if isinstance(reply, ServerError):  # only a subscription can be refused for good
            error = RedisUnavailable(self.shown_url, f"it refused SUBSCRIBE ({reply}); readers need their channels")
            for asked in self._channels.values():
                asked.confirm(error)
            return
        if not isinstance(reply, list) or len(reply) != 3:  # the answer to a PING, in one form or the other
            return
        kind, name, payload = reply
        channel = self._channels.get(name)
        if channel is None:
            return
        if kind == b"message":
            for listener in tuple(channel.listeners):
                listener.on_bell(payload)
        elif kind == b"subscribe":
            channel.confirm()

    def _start_round(self) -> None:
        self._round_scheduled = False
        requests, self._requests = self._requests, []
        handlers: list[Handler] = []
        self._unanswered += len(requests)
        for _, count, handler in requests:
            handlers += self._collecting(count, handler)
        self._reads.send(b"".join([commands for commands, _, _ in requests]), handlers)

    def _collecting(self, count: int, handler: Callable[[list[Reply] | None], None]) -> list[Handler]:
        replies: list[Reply] = []

        def collect(reply: Reply) -> None:
            replies.append(reply)
            if len(replies) < count:
                return
            self._unanswered -= 1
            handler(None if any(isinstance(reply, ConnectionLost) for reply in replies) else replies)
            if self._unanswered == 0 and self._requests and not self._round_scheduled:
                self._start_round()

        return [collect] * count


def _is_passing(reply: Reply) -> bool:
    return isinstance(reply, ServerError) and is_passing(reply)


def _settle(future: "asyncio.Future[list[Reply] | None]", replies: list[Reply] | None) -> None:
    if not future.done():
        future.set_result(replies)


@asynccontextmanager
async def open_hub(url: str, *, connect_timeout_s: float) -> AsyncIterator[Hub]:
    """A hub for the block's time.

    Raises:
        RedisUnavailable: the server can not be reached now; later breaks are mended silently.
    """
    hub = Hub(url, connect_timeout_s)
    await hub.open()
    try:
        async with background(hub.keep_open(), "deltafan-hub"):
            yield hub
    finally:
        hub.fail(RuntimeError("this consumer is closed: use it inside its `async with` block"))
        hub.close()
