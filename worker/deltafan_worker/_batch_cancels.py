"""Batches whose end was asked for: of their jobs, those that wait are not begun, whether their runner lives or not."""

import time
from collections.abc import Callable
from contextlib import suppress

from arq.connections import ArqRedis
from redis.exceptions import RedisError

from deltafan._keys import Keys
from deltafan._request import JobRequest

_LOOK_S = 1.0
"""So long a batch that is not cancelled is not looked up again: one round trip a second, whatever its size."""
_KNOWN = 1000


class BatchCancels:
    """Looks batches up, as jobs name them in their metadata; other jobs cost nothing."""

    def __init__(self, pool: ArqRedis, keys: Keys, clock: Callable[[], float] = time.monotonic) -> None:
        self._pool = pool
        self._keys = keys
        self._clock = clock
        self._goes_on_until: dict[str, float] = {}

    async def covers(self, request: JobRequest) -> bool:
        """Whether the job is of a batch whose end was asked for after it had been submitted."""
        batch_id = request.metadata.get("batch") if request.lane == "batch" else None
        if batch_id is None or self._goes_on_until.get(batch_id, 0.0) > self._clock():
            return False
        with suppress(RedisError, OSError):  # then it is run: the next look may tell
            asked_ms = await self._pool.hget(self._keys.batch(batch_id), "cancel")  # type: ignore[misc]
            if asked_ms is not None:
                return (request.submitted_at_ms or 0) <= int(asked_ms)
        if len(self._goes_on_until) >= _KNOWN:
            self._goes_on_until.clear()
        self._goes_on_until[batch_id] = self._clock() + _LOOK_S
        return False
