import pytest
from redis.asyncio import Redis

from support.leaks import ETERNAL, immortal_keys


@pytest.mark.immortal_keys("it leaves some to see them found")
async def test_a_key_without_a_lifetime_is_found_unless_it_may_live_for_ever(redis: Redis) -> None:
    await redis.set("b", "1")
    await redis.xadd("a", {"type": "started"})
    await redis.set("with a lifetime", "1", ex=60)
    for key in ETERNAL:
        await redis.set(key, "1")
    assert await immortal_keys(redis) == [b"a", b"b"]


async def test_what_one_test_left_the_next_does_not_see(redis: Redis) -> None:
    assert await redis.dbsize() == 0
