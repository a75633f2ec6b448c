"""How a claimed job leaves its worker: done, parked or given back. Each is said to the queue through any outage."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from redis.exceptions import RedisError

from deltafan._keys import Keys
from deltafan._lua import Script, load
from deltafan_worker._claim import Claim
from deltafan_worker._queue_pool import QueuePool, run_script

log = logging.getLogger("deltafan.worker")

KEEP_FOR_EVER = -1
_RETRY_PAUSE_S = 0.2

_CLOSE, _RELEASE = (load(name, "deltafan_worker", using=()) for name in ("close", "release"))


class Leaving:
    """The ways out of a claim; a lease that is another's by then is left alone."""

    def __init__(self, pool: QueuePool, keys: Keys, ledger_max_records: int, billed_ttl_ms: int) -> None:
        self._pool = pool
        self._keys = keys
        self._ledger = (billed_ttl_ms, ledger_max_records)

    async def close(self, claim: Claim, result: bytes | None, ttl_ms: int) -> None:
        """The job is done: bill its model calls and tell arq its `result`, kept for `ttl_ms` (0: not at all)."""
        keys = (claim.queue, self._keys.usage, self._keys.billed(claim.job_id))
        notes = [part for note in claim.notes for part in note]
        args = (claim.token, claim.job_id, (ttl_ms and result) or b"", ttl_ms, *self._ledger, *notes)
        if not await self._insist(_CLOSE, keys, args):
            log.info("job %s: ended, but its lease is another's; leaving the queue as it is", claim.job_id)

    async def release(self, claim: Claim, delay_ms: int) -> None:
        """Another worker is to take it; what it has cost so far is billed."""
        if claim.notes:
            await self.close(replace(claim, token=""), None, 0)
        keys = (claim.queue, self._keys.doorbell(claim.queue))
        await self._insist(_RELEASE, keys, (claim.token, claim.job_id, delay_ms))

    async def _insist(self, script: Script, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run a script as often as it takes; all of ours are safe to repeat."""
        failed = False
        while True:
            try:
                return await run_script(self._pool, script, keys, args)
            except (RedisError, OSError) as error:
                if not failed:
                    log.warning("the queue's Redis did not take %s (%s); going on trying", script.name, error)
                failed = True
                await asyncio.sleep(_RETRY_PAUSE_S)
