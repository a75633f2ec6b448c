"""Which worker processes are alive, by what they show of themselves."""

import time

from deltafan._client import RedisClient
from deltafan._keys import Keys

SHOWN_S = 15.0
"""How long a process counts as alive after it has shown itself, which it does three times in that span."""


async def living_workers(redis_url: str, *, prefix: str = "deltafan") -> list[str]:
    """The names, `<host>:<pid>`, of the processes that have shown themselves lately. One round trip.

    Raises:
        RedisUnavailable: the queue's server can not be reached.
    """
    async with RedisClient(redis_url, patience_s=1.0) as client:
        names = await client.call("ZRANGEBYSCORE", Keys(prefix).workers, time.time() - SHOWN_S, "+inf")
    return [name.decode() for name in names]
