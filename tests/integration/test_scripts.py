"""The job's scripts one by one, where a rule of theirs is easier to see than in a random walk."""

from collections.abc import Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from deltafan import Retention
from deltafan._keys import Keys
from deltafan._lua import load
from support.waiting import wait_until

KEYS = Keys().job("j")
RETENTION = Retention()
TTLS = RETENTION.ended_ms


class Scripts:
    """Runs them on a job called j."""

    def __init__(self, redis: Any) -> None:  # its types mix both worlds
        self.redis = redis

    async def __call__(self, name: str, *args: Any, package: str = "deltafan_worker") -> Any:
        source = load(name, package).source.decode()
        return await self.redis.eval(source, 3, *KEYS, *args)

    async def begin(
        self, run: str, claim: int, *, prev: str = "", known: int = 0, mode: str = "claim", call: str = "c"
    ) -> Any:
        owner = (run, prev, claim, known, mode, 10, RETENTION.live_ms)
        return await self("begin", *owner, '"x":1', call, '"x":1', "", "", *TTLS, "restart", "")

    async def finish(self, run: str, attempt: bytes, kind: str = "completed") -> Any:
        return await self("finish", run, attempt, 1, kind, "{}", "{}", "c", "{}", *TTLS)


@pytest.fixture
def scripts(redis: Redis) -> Scripts:
    return Scripts(redis)


async def test_an_older_claim_takes_nothing_from_a_newer_one(scripts: Scripts) -> None:
    """A worker that stalled between its claim and its begin wakes up when another has long begun."""
    assert (await scripts.begin("new", 2))[0] == b"RUN"
    assert await scripts.begin("old", 1) == [b"STALE"]
    assert await scripts.begin("other", 2) == [b"STALE"], "nor does another run of the same claim"
    assert (await scripts.begin("new", 2))[0] == b"RUN", "but repeating is harmless"
    assert await scripts.redis.hget(KEYS[1], "run") == b"new"


async def test_a_number_is_never_issued_again_not_even_when_all_keys_are_lost(scripts: Scripts) -> None:
    first = (await scripts.begin("a", 1))[1]
    server_ms = _clock(scripts.redis)
    await wait_until(lambda: _is_after(server_ms, int(first)), "the server's clock has moved on")
    await scripts.redis.delete(*KEYS)
    second = (await scripts.begin("b", 1))[1]
    assert int(second) > int(first)
    with pytest.raises(Exception, match="equal or smaller"):
        await scripts.redis.xadd(KEYS[0], {"type": "content", "data": "x"}, id=f"{int(first)}-1")


@pytest.mark.parametrize("witness", ["state", "writer", "stream"])
async def test_a_number_is_never_issued_again_not_even_when_the_clock_goes_back(scripts: Scripts, witness: str) -> None:
    """A server whose clock was ahead is replaced by one that is right, and a single witness of the number is left."""
    first = int((await scripts.begin("a", 1))[1]) + 3_600_000
    await scripts.redis.delete(KEYS[0])
    if witness == "state":
        await scripts.redis.hset(KEYS[1], "attempt", first)
    elif witness == "stream":
        await scripts.redis.xadd(KEYS[0], {"type": "started", "data": "{}"}, id=f"{first}-0")
    if witness == "writer":
        second = await scripts.begin("b", 1, prev="a", known=first, mode="replay")
    else:
        second = await scripts.begin("b", 2)
    assert int(second[1]) == first + 1


def _clock(redis: Any) -> Callable[[], Any]:
    clock: Callable[[], Any] = redis.time
    return clock


async def _is_after(clock: Callable[[], Any], moment_ms: int) -> bool:
    seconds, micros = await clock()
    return bool(seconds * 1000 + micros // 1000 > moment_ms)


async def test_an_acknowledged_cancel_wins_over_an_answer_that_is_whole(scripts: Scripts) -> None:
    attempt = (await scripts.begin("a", 1))[1]
    assert await scripts("cancel", "why", RETENTION.live_ms, *TTLS, package="deltafan") == [b"REQUESTED"]
    assert await scripts.finish("a", attempt) == [b"CANCEL", b"why"]
    assert (await scripts.finish("a", attempt, "cancelled"))[:2] == [b"OK", b"cancelled"]


async def test_a_response_belongs_to_its_call_only(scripts: Scripts) -> None:
    await scripts.begin("a", 1, call="c1")
    assert await scripts("note", "a", "response", "c1 openai resp_1") == 1
    await scripts.begin("b", 1, prev="a", mode="restart", call="c1")
    assert await scripts.redis.hget(KEYS[1], "response") == b"c1 openai resp_1", "whoever goes on finds it"
    await scripts.begin("c", 1, prev="b", mode="restart", call="c2")
    assert await scripts.redis.hget(KEYS[1], "response") is None, "and another call does not"
    assert await scripts("note", "a", "response", "c1 openai resp_1") == 0, "nor does a late note come back"
