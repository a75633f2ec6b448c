"""Which worker processes are alive, by what they show of themselves. All times are of the server's clock."""

from deltafan._client import RedisClient
from deltafan._keys import Keys
from deltafan._resp import pack

SHOWN_S = 15.0
"""How long a process counts as alive after it has shown itself, which it does three times in that span."""


async def living_workers(redis_url: str, *, prefix: str = "deltafan") -> list[str]:
    """The names, `<host>:<pid>`, of the processes that have shown themselves lately. One round trip.

    Raises:
        RedisUnavailable: the queue's server can not be reached.
    """
    async with RedisClient(redis_url, patience_s=1.0) as client:
        (seconds, micros), flat = await client.pipeline(
            [pack("TIME"), pack("ZRANGE", Keys(prefix).workers, 0, -1, "WITHSCORES")]
        )
    since_s = int(seconds) + int(micros) / 1e6 - SHOWN_S
    return [name.decode() for name, shown_s in zip(flat[::2], flat[1::2], strict=True) if float(shown_s) > since_s]
