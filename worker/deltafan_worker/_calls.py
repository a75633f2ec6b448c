"""An answer from whichever provider gives one: retries in place, other paths, other providers, cool-downs.

All of it only before the first delta. What breaks after that is for the run to begin anew, visibly.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from typing import Any
from uuid import uuid4

import aiohttp

from deltafan._events import Delta
from deltafan_worker._admission import Admission
from deltafan_worker._apis import APIS, ending, generating, listening
from deltafan_worker._background import RESPONSE_LOST, BackgroundDecoder, ResponseNote, Unread
from deltafan_worker._cooldown import Cooldowns
from deltafan_worker._decoder import Completion, Decoder
from deltafan_worker._ending import CallMeter, Ending
from deltafan_worker._plain import texts_in
from deltafan_worker._resumption import Plan
from deltafan_worker._retry import FIRST_PAUSE_S, LONGEST_RETRY_AFTER_S, pause_before
from deltafan_worker._route import Route
from deltafan_worker._upstream import stream_generation, tell
from deltafan_worker._upstream_error import UpstreamError, too_long
from deltafan_worker._writer import StreamWriter

SHORTEST_QUOTE = 12
"""Characters. What is shorter in a prompt may be the provider's own word in its message."""
_WAITS = 3
"""So often a job waits for a cool-down that others renew, before it sees for itself."""


class ModelCalls:
    """Makes the model calls of a process. Cancelling one closes its connection."""

    def __init__(self, session: aiohttp.ClientSession, cooldowns: Cooldowns, *, max_retries: int) -> None:
        self._session = session
        self._cooldowns = cooldowns
        self._max_retries = max_retries
        self._moved: dict[tuple[str, str], str] = {}

    def prepare(self, routes: Sequence[Route]) -> None:
        """Learn what the fleet knows of these providers; to be called a round trip before `answer`."""
        self._cooldowns.refresh(routes)

    async def answer(
        self,
        routes: Sequence[Route],
        body: Mapping[str, Any],
        writer: StreamWriter,
        meter: CallMeter,
        admission: Admission,
    ) -> Ending:
        """Stream one answer into the writer. What a provider does is not raised, but for one thing.

        Raises:
            MustWait: a batch job is to be given back until its providers have room.
        """
        told = UpstreamError(code="no_provider", message="no provider is configured", retryable=False)
        remaining = sorted(routes, key=lambda route: self._cooldowns.left_s(route) > 0)
        limited: list[Route] = []
        while remaining:
            route = remaining.pop(0)
            has_others = bool(remaining)
            try:
                return await self._ask(route, body, writer, meter, admission, has_others=has_others)
            except UpstreamError as error:
                last = error
            if len(writer.log) or last.is_refused_everywhere:
                return _failed(last)
            if last.retryable or not told.retryable:  # what passes is told rather than what does not
                told = last
            if has_others and last.is_rate_limit and (last.retry_after_s or 0) <= LONGEST_RETRY_AFTER_S:
                limited.append(route)
            if not remaining:  # those that were left because there were others
                admission.step_aside(route, last)
                remaining, limited = limited, []
        return _failed(told)

    async def _ask(
        self,
        route: Route,
        body: Mapping[str, Any],
        writer: StreamWriter,
        meter: CallMeter,
        admission: Admission,
        *,
        has_others: bool,
    ) -> Ending:
        """Try one provider, as often as it may help."""
        for retry in count(1):
            if not admission.is_patient and await self._wait_out(route):
                admission.give_back()  # it was counted in a minute that may be over
            await admission.enter(route)
            ending = None
            try:
                ending = await self._find_and_call(route, body, writer, meter)
            except UpstreamError as error:
                error.hide(_quotable(body))
                pause_s = pause_before(retry, error, max_retries=self._max_retries, jitter=random.random())
                cooldown_s = error.retry_after_s or pause_s or FIRST_PAUSE_S
                if error.is_rate_limit:
                    self._cooldowns.note(route, cooldown_s)
                admission.failed(route, error, cooldown_s)
                may_wait_elsewhere = error.is_rate_limit and (has_others or admission.is_patient)
                if pause_s is None or len(writer.log) or may_wait_elsewhere:
                    raise
            else:
                return ending
            finally:
                admission.leave(meter, answered=ending is not None)
            self._cooldowns.refresh((route,))
            await asyncio.sleep(pause_s)
        raise AssertionError("count() has no end")

    async def _wait_out(self, route: Route) -> bool:
        """Wait for a cool-down's end. Returns whether there was one."""
        for waits in range(_WAITS):
            if (left_s := self._cooldowns.left_s(route)) <= 0:
                return waits > 0
            # Not all at once when it is over.
            await asyncio.sleep(left_s + random.random() * min(left_s, 1.0))
            self._cooldowns.refresh((route,))
        return True

    async def _find_and_call(
        self, route: Route, body: Mapping[str, Any], writer: StreamWriter, meter: CallMeter
    ) -> Ending:
        """Call the model where it was found last, and once where else it can be."""
        place = (route.provider, route.model)
        if route.other_url is not None and self._moved.get(place) == route.other_url:
            route = replace(route, url=route.other_url, other_url=route.url)
        if route.in_background:
            return await self._call_in_background(route, body, writer, meter)
        try:
            return await self._call(route, body, writer, meter)
        except UpstreamError as error:
            if not error.is_wrong_path or route.other_url is None or len(writer.log):
                raise
        self._moved[place] = route.other_url
        return await self._call(replace(route, url=route.other_url, other_url=None), body, writer, meter)

    async def _call(self, route: Route, body: Mapping[str, Any], writer: StreamWriter, meter: CallMeter) -> Ending:
        decoder = APIS[route.api].decoder(route.model)
        with _metered(route, decoder, writer, meter):
            call, publish = generating(route, body), _publishing(writer, meter)
            completion = await stream_generation(self._session, route, call, decoder, publish)
        return Ending.completed(completion.finish_reason)

    async def _call_in_background(
        self, route: Route, body: Mapping[str, Any], writer: StreamWriter, meter: CallMeter
    ) -> Ending:
        decoder = BackgroundDecoder(
            lambda id_: writer.note_response(str(ResponseNote(meter.call_id, route.provider, id_)))
        )
        publish = _publishing(writer, meter)
        with _metered(route, decoder, writer, meter):
            try:
                call = generating(route, body)
                completion = await stream_generation(self._session, route, call, decoder, publish)
            except UpstreamError as error:
                if decoder.response_id is None or not error.may_be_found_again:
                    raise
                completion = await self._find_again(route, decoder.response_id, decoder, writer, meter)
        return Ending.completed(completion.finish_reason)

    async def _find_again(
        self, route: Route, response_id: str, decoder: BackgroundDecoder, writer: StreamWriter, meter: CallMeter
    ) -> Completion:
        """Read on in a response of our own whose connection broke."""
        try:
            return await self._listen(route, response_id, decoder, _publishing(writer, meter))
        except UpstreamError:
            if not len(writer.log):  # another may be made in its place
                await self.end_background((route,), ResponseNote(meter.call_id, route.provider, response_id))
            raise

    async def listen_again(self, plan: Plan, note: ResponseNote, writer: StreamWriter, meter: CallMeter) -> Ending:
        """Read on in a response that another worker began."""
        route, decoder = plan.routes[0], BackgroundDecoder(lambda _id: None, note.id)
        publish = Unread(plan.published, _publishing(writer, meter))
        try:
            with _metered(route, decoder, writer, meter):
                completion = await self._listen(route, note.id, decoder, publish)
        except UpstreamError as error:
            error.hide(_quotable(plan.body))
            return _failed(error)
        return Ending.completed(completion.finish_reason)

    async def _listen(
        self, route: Route, response_id: str, decoder: BackgroundDecoder, publish: Callable[[list[Delta]], None]
    ) -> Completion:
        """Read a background response on, over as many connections as it takes; only progress pays for another."""
        retry = 0
        while True:
            decoder.resume()
            before = decoder.last_event
            try:
                call = listening(route, response_id, max(0, before))
                return await stream_generation(self._session, route, call, decoder, publish)
            except UpstreamError as error:
                if error.status == 404:
                    message = "the provider no longer has the response"
                    raise UpstreamError(code=RESPONSE_LOST, message=message, retryable=True) from None
                retry = 1 if decoder.last_event > before else retry + 1
                pause_s = pause_before(retry, error, max_retries=self._max_retries, jitter=random.random())
                if pause_s is None or not error.may_be_found_again:
                    raise
            await asyncio.sleep(pause_s)

    async def end_background(self, routes: Sequence[Route], response: ResponseNote | None) -> None:
        """End a response that nobody will read, if there is one: it would be generated on; best effort."""
        for route in routes:
            if response is not None and route.in_background and route.provider == response.provider:
                with suppress(UpstreamError):
                    await tell(self._session, ending(route, response.id), within_s=5.0)
                return


@contextmanager
def _metered(route: Route, decoder: Decoder, writer: StreamWriter, meter: CallMeter) -> Iterator[None]:
    """Measure a call. One that is repeated leaves its record first, under an id of its own."""
    clock = asyncio.get_running_loop().time
    if meter.was_taken:
        record = meter.record("failed", attempt=writer.attempt, attempt_no=writer.attempt_no)
        writer.note_call(replace(record, call_id=uuid4().hex))
    meter.route, meter.started_at_ms, meter.started_s = route, time.time_ns() // 1_000_000, clock()
    try:
        yield
    except UpstreamError as error:
        error.hide(route.secrets)
        meter.was_taken = not (error.was_refused or error.is_wrong_path)
        raise
    finally:
        meter.ended_s = clock()
        meter.note(decoder)


def _failed(error: UpstreamError) -> Ending:
    return Ending.failed(error.code, error.message, retryable=error.retryable)


def _quotable(body: Mapping[str, Any]) -> Iterator[str]:
    """The texts of a prompt, as far as they can be told from words of the provider's own."""
    prompt = [body.get(name) for name in ("messages", "input", "prompt", "instructions")]
    return (text for text in texts_in(prompt) if len(text) >= SHORTEST_QUOTE)


def _publishing(writer: StreamWriter, meter: CallMeter) -> Callable[[list[Delta]], None]:
    clock = asyncio.get_running_loop().time

    def publish(deltas: list[Delta]) -> None:
        size_bytes = writer.extend(deltas)
        if meter.deltas == 0:
            meter.first_delta_s = clock()
        meter.deltas += len(deltas)
        if size_bytes > meter.route.max_output_bytes:
            raise too_long(meter.route.max_output_bytes)

    return publish
