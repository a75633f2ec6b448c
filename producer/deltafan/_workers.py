"""Which worker processes are alive: those whose load has not expired, so nobody's clock matters but the server's."""

from dataclasses import dataclass

import orjson

from deltafan._client import RedisClient
from deltafan._keys import Keys

SHOWN_S = 15.0
"""How long a process counts as alive after it has shown itself, which it does three times in that span."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker process, as it last showed itself."""

    name: str
    """`<host>:<pid>`."""
    running: int
    """Jobs of all lanes."""
    slots: int


async def living_workers(redis_url: str, *, prefix: str = "deltafan") -> list[Worker]:
    """The processes that have shown themselves lately. Two round trips.

    Raises:
        RedisUnavailable: the queue's server can not be reached.
    """
    keys = Keys(prefix)
    async with RedisClient(redis_url, patience_s=1.0) as client:
        names = [name.decode() for name in await client.call("ZRANGE", keys.workers, 0, -1)]
        loads = await client.call("MGET", *map(keys.worker, names)) if names else []
    return [_worker(name, load) for name, load in zip(names, loads, strict=True) if load is not None]


def _worker(name: str, load: bytes) -> Worker:
    fields = orjson.loads(load)
    return Worker(name, fields["running"], fields["slots"])
