"""How far batches are, for any machine to see: one hash each, and a list of them."""

import time
from collections.abc import Mapping
from typing import Any

from deltafan._client import RedisClient
from deltafan._errors import InvalidRequest, JobNotFound
from deltafan._keys import Keys
from deltafan._lua import load
from deltafan._resp import pack, raise_error
from deltafan._retention import Retention

_LISTED = 1000


class Batches:
    """The batches of one Redis."""

    def __init__(self, client: RedisClient, keys: Keys, retention: Retention) -> None:
        self._client = client
        self._keys = keys
        self._retention = retention

    async def report(self, batch_id: str, progress: Mapping[str, Any], *, is_first: bool) -> bool:
        """Keep what a runner says. Returns whether the batch's end was asked for."""
        key, now_s = self._keys.batch(batch_id), time.time()
        flat = [part for item in progress.items() for part in item]
        commands = [
            pack("HSET", key, "heard_s", round(now_s, 3), *flat),
            pack("PEXPIRE", key, self._retention.state_ms),
            pack("ZADD", self._keys.batches, now_s, batch_id),
            pack("ZREMRANGEBYSCORE", self._keys.batches, "-inf", now_s - self._retention.state_ms / 1000),
            pack("PEXPIRE", self._keys.batches, self._retention.state_ms),
            pack("HEXISTS", key, "cancel"),
        ]
        if is_first:
            commands.insert(0, pack("HDEL", key, "cancel"))
        replies = await self._client.pipeline(commands)
        return bool(raise_error(replies[-1]))

    async def cancel(self, batch_id: str) -> float:
        """Leave word for the runner. Returns how many seconds ago it was heard of."""
        (answer,) = await self._client.run_many(load("cancel_batch", using=()), [((self._keys.batch(batch_id),), ())])
        if answer is None:
            raise JobNotFound(batch_id)
        status, heard_s = (raw.decode() for raw in answer)
        if status != "running":
            raise InvalidRequest("batch_id", f"batch {batch_id} is {status}; there is nothing to cancel")
        return max(0.0, time.time() - float(heard_s))

    async def all(self) -> dict[str, dict[str, str]]:
        """What is known of each, the one last heard of first."""
        ids = [raw.decode() for raw in await self._client.call("ZREVRANGE", self._keys.batches, 0, _LISTED - 1)]
        found = await self._client.pipeline([pack("HGETALL", self._keys.batch(id_)) for id_ in ids]) if ids else []
        return {
            id_: {name.decode(): value.decode() for name, value in zip(flat[::2], flat[1::2], strict=True)}
            for id_, flat in zip(ids, found, strict=True)
            if flat
        }
