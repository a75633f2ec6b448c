"""A watchdog over a stream of data: too long a silence cuts the block it guards."""

import asyncio
from types import TracebackType
from typing import Self


class Silence(Exception):
    """The stream was silent for too long."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(message)


class Watchdog:
    """`async with Watchdog(first_s, silence_s) as dog:` raises Silence when `dog.fed()` is not called in time.

    Until it has been fed a delta there is one time for all: data without any, such as the news that the model has begun
    to think, changes nothing.

    Feeding it costs one attribute write: the one timer runs out, looks when the last food came, and sleeps on.
    """

    def __init__(self, first_s: float, silence_s: float) -> None:
        self._first_s = first_s
        self._silence_s = silence_s
        self._scope = asyncio.timeout(None)
        self._loop = asyncio.get_running_loop()
        self.fed_at = self._loop.time()
        """When data came last, by the loop's clock; who writes it knows that there was a delta before."""
        self._barked = False
        self._hungry = True

    def fed(self, *, has_delta: bool) -> None:
        """Data has come."""
        if has_delta:
            self._hungry = False
        if not self._hungry:
            self.fed_at = self._loop.time()

    async def __aenter__(self) -> Self:
        await self._scope.__aenter__()
        self._timer = self._loop.call_later(min(self._first_s, self._silence_s), self._look)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        try:
            await self._scope.__aexit__(kind, error, trace)
        except TimeoutError:
            if not self._barked:
                raise
            if self._hungry:
                raise Silence("first_delta_timeout", f"no delta within {self._first_s:g} s") from None
            raise Silence("silence_timeout", f"no data for {self._silence_s:g} s in mid-answer") from None

    def _look(self) -> None:
        limit_s = self._first_s if self._hungry else self._silence_s
        left_s = self.fed_at + limit_s - self._loop.time()
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._look)
        else:
            self._barked = True
            self._scope.reschedule(self._loop.time())
