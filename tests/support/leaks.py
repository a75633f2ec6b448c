"""Which keys may live for ever, and which do without being allowed to."""

from redis.asyncio import Redis

ETERNAL = frozenset(
    {
        b"deltafan:queue:interactive",
        b"deltafan:queue:batch",
        b"deltafan:usage",
        # What arq itself never lets expire.
        b"arq:queue",
        b"arq:abort",
    }
)
_NO_LIFETIME = -1


async def immortal_keys(client: Redis) -> list[bytes]:
    """Keys without a lifetime that should have one, sorted."""
    keys = [key async for key in client.scan_iter(count=1000) if key not in ETERNAL]
    return sorted([key for key in keys if await client.ttl(key) == _NO_LIFETIME])
