"""One model call over HTTP: bytes in, deltas out.

aiohttp is used without a vendor's SDK above it: on the same stream of single deltas it costs 39 us of CPU
per delta where the openai client over the same transport costs 53 and over its default transport 120, and there is
nothing left for an SDK to do, since decoding, retrying and the reading of errors are ours for three APIs.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import aiohttp

from deltafan._events import Delta
from deltafan_worker._apis import HttpCall
from deltafan_worker._body import read_body
from deltafan_worker._decoder import Completion, Decoder
from deltafan_worker._route import Route
from deltafan_worker._upstream_error import UpstreamError, from_response, too_long
from deltafan_worker._watchdog import Silence, Watchdog

LAST_WORDS_S = 5.0
"""Behind its finish_reason an answer is whole: only its usage is waited for, and no longer than this."""
MAX_ERROR_BYTES = 64 * 1024
_ERROR_BODY_S = 5.0
_BLANK = b"\xef\xbb\xbf \t\r\n"
MAX_AROUND_BYTES = 1024 * 1024
"""What an answer that comes as one object may have around its text; escaped, that may be twice as long."""


async def stream_generation(
    session: aiohttp.ClientSession,
    route: Route,
    call: HttpCall,
    decoder: Decoder,
    publish: Callable[[list[Delta]], None],
) -> Completion:
    """Make the call and hand the deltas of each packet to `publish` as it arrives. Cancelling it closes the connection.

    Raises:
        UpstreamError: whatever went wrong; deltas that were handed over stand.
    """
    timeouts = route.timeouts
    try:
        async with asyncio.timeout(timeouts.total_s), Watchdog(timeouts.first_delta_s, timeouts.silence_s) as watchdog:
            async with await _open(session, route, call) as response:
                await _pump(response, decoder, publish, watchdog, route.max_output_bytes)
    except (Silence, TimeoutError, aiohttp.ClientError) as error:
        if not decoder.is_whole:
            raise _translated(error, route) from error
    return decoder.completion()


def _translated(error: Exception, route: Route) -> UpstreamError:
    if isinstance(error, Silence):
        return UpstreamError(code=error.code, message=str(error), retryable=True)
    if isinstance(error, aiohttp.ClientError):
        message = f"the connection to {route.provider} broke ({type(error).__name__})"
        return UpstreamError(code="connection_lost", message=message, retryable=True)
    message = f"the provider was not done after {route.timeouts.total_s:g} s"
    return UpstreamError(code="total_timeout", message=message, retryable=False)


async def tell(session: aiohttp.ClientSession, call: HttpCall, *, within_s: float) -> None:
    """Make a call whose answer changes nothing.

    Raises:
        UpstreamError: it did not arrive.
    """
    try:
        timeout = aiohttp.ClientTimeout(total=within_s)
        async with session.request(call.method, call.url, data=call.data, headers=call.headers, timeout=timeout):
            pass
    except (aiohttp.ClientError, TimeoutError) as error:
        raise UpstreamError(code="connection_lost", message=type(error).__name__, retryable=True) from error


async def _pump(
    response: aiohttp.ClientResponse,
    decoder: Decoder,
    publish: Callable[[list[Delta]], None],
    watchdog: Watchdog,
    max_output_bytes: int,
) -> None:
    async with asyncio.timeout(None) as patience:
        frames, clock = 0, asyncio.get_running_loop().time

        def take(data: bytes) -> bool:
            nonlocal frames
            if deltas := decoder.read_alike(data):  # so there was a delta before
                publish(deltas)
                frames, watchdog.fed_at = decoder.frames, clock()
                return True
            decoder.feed(data)
            has_delta = _publish_decoded(decoder, publish)
            if decoder.frames != frames:
                frames = decoder.frames
                watchdog.fed(has_delta=has_delta)
            if decoder.is_whole and patience.when() is None:
                patience.reschedule(clock() + LAST_WORDS_S)
            return not decoder.finished

        data = await _first_bytes(response, max_output_bytes)
        if data.startswith(b"{"):  # no stream can begin so, whatever it is labelled: the wish for one was ignored
            decoder.feed_whole(await _read_whole(response, data, max_output_bytes))
        elif data and take(data):
            await read_body(response, take)
    decoder.end()
    _publish_decoded(decoder, publish)


async def _first_bytes(response: aiohttp.ClientResponse, max_output_bytes: int) -> bytes:
    """What arrives first, without the blank lines that some servers send while they wait."""
    blanks = 0
    while data := await response.content.readany():
        if head := data.lstrip(_BLANK):
            return head
        blanks += len(data)
        if blanks > MAX_AROUND_BYTES:
            raise too_long(max_output_bytes)
    return b""


async def _read_whole(response: aiohttp.ClientResponse, head: bytes, max_output_bytes: int) -> bytes:
    body = bytearray(head)
    while data := await response.content.readany():
        body += data
        if len(body) > 2 * max_output_bytes + MAX_AROUND_BYTES:
            raise too_long(max_output_bytes)
    return bytes(body)


def _publish_decoded(decoder: Decoder, publish: Callable[[list[Delta]], None]) -> bool:
    deltas: list[Delta] = []
    next_delta = decoder.next_delta
    try:
        while (delta := next_delta()) is not None:
            deltas.append(delta)
    finally:  # also what came before an error
        if deltas:
            publish(deltas)
    return bool(deltas)


async def _open(session: aiohttp.ClientSession, route: Route, call: HttpCall) -> aiohttp.ClientResponse:
    """The response, to be left by whoever reads it."""
    timeout = aiohttp.ClientTimeout(total=None, connect=route.timeouts.connect_s)  # from the name's address to TLS
    try:
        options: Any = {"headers": call.headers, "timeout": timeout, "allow_redirects": False}
        response = await session.request(call.method, call.url, data=call.data, **options)
    except (aiohttp.ServerTimeoutError, aiohttp.ConnectionTimeoutError):
        message = f"{route.provider} did not accept a connection within {route.timeouts.connect_s:g} s"
        raise UpstreamError(code="connect_timeout", message=message, retryable=True, was_refused=True) from None
    except aiohttp.ClientConnectorError as error:
        message = f"{route.provider} can not be reached ({error.os_error.strerror or 'no address'})"
        raise UpstreamError(code="connect_failed", message=message, retryable=True, was_refused=True) from error
    except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
        # Mostly a kept-alive connection that the server closed at the moment when it was used again.
        message = f"the connection to {route.provider} broke ({type(error).__name__})"
        raise UpstreamError(code="connection_lost", message=message, retryable=True, at_once=True) from error
    if response.status == 200:
        return response
    async with response:
        detail = await _read_detail(response)
        raise from_response(response.status, response.headers, detail, now_s=time.time())


async def _read_detail(response: aiohttp.ClientResponse) -> bytes:
    """What there is of an error's body: the status counts, however the rest breaks or hangs."""
    detail = bytearray()
    with suppress(TimeoutError, aiohttp.ClientError):
        async with asyncio.timeout(_ERROR_BODY_S):
            while len(detail) < MAX_ERROR_BYTES and (data := await response.content.readany()):
                detail += data
    return bytes(detail[:MAX_ERROR_BYTES])
