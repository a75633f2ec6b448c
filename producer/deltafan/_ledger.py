"""Reading the usage ledger."""

import orjson

from deltafan._client import RedisClient
from deltafan._keys import Keys
from deltafan._usage import UsageRecord


async def read_ledger(redis_url: str, *, prefix: str = "deltafan", last: int = 20) -> list[UsageRecord]:
    """The newest records, oldest of them first.

    Raises:
        RedisUnavailable: the queue's server can not be reached.
    """
    async with RedisClient(redis_url) as client:
        entries = await client.call("XREVRANGE", Keys(prefix).usage, "+", "-", "COUNT", last)
    return [UsageRecord.from_json(orjson.loads(fields[5])) for _, fields in reversed(entries)]
