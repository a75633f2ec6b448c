"""How far batches are, for any machine to see: one hash each, and a list of them."""

from collections.abc import Mapping
from typing import Any

from deltafan._client import RedisClient
from deltafan._errors import InvalidRequest, JobNotFound
from deltafan._keys import Keys
from deltafan._lua import load
from deltafan._resp import pack
from deltafan._retention import Retention

_LISTED = 1000


class Batches:
    """The batches of one Redis. All times are of its clock."""

    def __init__(self, client: RedisClient, keys: Keys, retention: Retention) -> None:
        self._client = client
        self._keys = keys
        self._retention = retention

    async def report(self, batch_id: str, progress: Mapping[str, Any], *, is_first: bool) -> bool:
        """Keep what a runner says. Returns whether the batch's end was asked for."""
        flat = [part for item in progress.items() for part in item]
        keys, args = (
            (self._keys.batch(batch_id), self._keys.batches),
            (batch_id, self._retention.state_ms, int(is_first), *flat),
        )
        return bool(await self._client.run(load("report_batch", using=()), keys, args))

    async def cancel(self, batch_id: str) -> float:
        """Leave word for runner and workers. Returns how many seconds ago the runner was heard of."""
        answer = await self._client.run(load("cancel_batch", using=()), (self._keys.batch(batch_id),), ())
        if answer is None:
            raise JobNotFound(batch_id)
        status, ago_ms = answer[0].decode(), answer[1]
        if status not in ("running", "interrupted"):
            raise InvalidRequest("batch_id", f"batch {batch_id} is {status}; there is nothing to cancel")
        return float(ago_ms / 1000)

    async def all(self) -> dict[str, dict[str, str]]:
        """What is known of each, the one last heard of first; `ago_s` is how long ago that was."""
        ids = [raw.decode() for raw in await self._client.call("ZREVRANGE", self._keys.batches, 0, _LISTED - 1)]
        commands = [pack("TIME"), *[pack("HGETALL", self._keys.batch(id_)) for id_ in ids]]
        (seconds, micros), *found = await self._client.pipeline(commands)
        now_s = int(seconds) + int(micros) / 1e6
        return {id_: _read(flat, now_s) for id_, flat in zip(ids, found, strict=True) if flat}


def _read(flat: list[bytes], now_s: float) -> dict[str, str]:
    fields = {name.decode(): value.decode() for name, value in zip(flat[::2], flat[1::2], strict=True)}
    return fields | {"ago_s": f"{max(0.0, now_s - float(fields['heard_s'])):.1f}"}
