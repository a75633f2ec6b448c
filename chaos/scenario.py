"""One scenario: a fleet under load, faults, and an account of what came out."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

import orjson
from redis.asyncio import Redis
from redis.exceptions import RedisError

from account import Account, Traits, bills_of, judge_readers
from deltafan import Consumer, Producer, UsageRecord
from faults import Fault, strike
from fleet import Fleet, fleet
from load import Load
from readers import Reading

PATIENCE_S = 45.0
"""So long after the last submit every reader has its end, or it hangs."""
SETTLING_S = 20.0
"""And so long after that the ledger is complete: what a crash has left is found by a sweep, and mended by the next."""
REST_S = 2.0
"""So long a server is left to itself when one has been away: a fleet whose server is hardly ever there gets nowhere."""
MIXTURE_PACE = 0.7
"""Several faults come closer together than one alone, so that they meet."""


async def run_scenario(seed: str, faults: Sequence[Fault], *, load_s: float, broken: str | None = None) -> Account:
    """Hurt a fleet under load for `load_s`, with faults drawn from these; then see what every reader has."""
    traits, account = Traits(faults), Account(Counter(runs=1))
    patience = 0.3 if broken else 1.0  # a broken build will never be done
    async with fleet(persistent=traits.persistent, replicated=traits.replicated, broken=broken) as made:
        async with _load(seed, made, traits) as (load, reading):
            with suppress(TimeoutError):
                async with asyncio.timeout(load_s + PATIENCE_S * patience), asyncio.TaskGroup() as tasks:
                    tasks.create_task(load.run(tasks, load_s))
                    tasks.create_task(_hurt(made, load, reading, faults, f"{seed}/faults", load_s))
        made.note_dead()
        account.counts += Counter(faults=len(reading.recovery.strikes), jobs=len(load.jobs))
        judge_readers(account, load, reading, await made.upstream.calls(), traits)
        await _settle(account, made, load, traits, SETTLING_S * patience)
    account.note(Counter(stuck=len(made.failures)), "; ".join(made.failures))
    return account


@asynccontextmanager
async def _load(seed: str, made: Fleet, traits: Traits) -> AsyncIterator[tuple[Load, Reading]]:
    """Two machines that submit and read, and one that knows XREAD alone."""
    url, replicas = made.env["DELTAFAN_REDIS_URL"], int(traits.replicated)
    async with (
        Producer.connect(url, replicas=replicas) as first,
        Producer.connect(url, replicas=replicas) as second,
        Consumer.connect(url) as reader,
        Consumer.connect(url) as another,
        Redis.from_url(url, socket_timeout=3) as redis,
    ):
        reading = Reading(made, (reader, another), redis)
        yield Load(seed, (first, second), reading, forgets=traits.goes_back), reading


async def _hurt(made: Fleet, load: Load, reading: Reading, faults: Sequence[Fault], seed: str, load_s: float) -> None:
    """Strike until the load ends; with several faults the next does not wait for the last to be over."""
    loop, chance, number = asyncio.get_running_loop(), random.Random(seed), 0
    pace, rest_s = (1.0, 0.0) if len(faults) == 1 else (MIXTURE_PACE, REST_S)
    end = loop.time() + load_s
    while not load.has_begun and loop.time() < end:
        await asyncio.sleep(0.05)
    async with asyncio.TaskGroup() as strikes:
        while loop.time() < end:
            fault, number = chance.choice(faults), number + 1
            if fault.owns not in made.owned:
                under_way = strikes.create_task(
                    _strike(made, reading, fault, random.Random(f"{seed}/{number}"), rest_s)
                )
                if len(faults) == 1:
                    await under_way
            await asyncio.sleep(fault.pause_s * pace * (0.5 + chance.random()))


async def _strike(made: Fleet, reading: Reading, fault: Fault, chance: random.Random, rest_s: float) -> None:
    if fault.owns:
        made.owned.add(fault.owns)
    at = await strike(fault, made, chance)
    if at is not None:
        reading.recovery.strikes.append(at)
    if fault.owns:
        await asyncio.sleep(rest_s)
        made.owned.discard(fault.owns)


async def _settle(account: Account, made: Fleet, load: Load, traits: Traits, settling_s: float) -> None:
    """Wait until the queues are empty and the ledger is right; what is not by then is wrong."""
    waiting, calls = 0, await made.upstream.calls()
    wrong = bills_of(load, [], calls, traits)
    with suppress(TimeoutError):
        async with asyncio.timeout(settling_s):
            while True:
                with suppress(RedisError, OSError, RuntimeError):
                    waiting, records = await _queues_and_ledger(made)
                    wrong = bills_of(load, records, calls, traits)
                    if not waiting and not wrong:
                        return
                await asyncio.sleep(0.2)
    for whose, found in wrong.items():
        account.note(found, whose)
    account.note(Counter(stuck=waiting), f"{waiting} jobs are still in the queues")


async def _queues_and_ledger(made: Fleet) -> tuple[int, list[UsageRecord]]:
    """How many jobs the queues hold, and the ledger."""
    async with made.redis as redis:
        waiting = [await redis.zcard(f"deltafan:queue:{lane}") for lane in ("interactive", "batch")]
        entries = await redis.xrange("deltafan:usage")
    return sum(waiting), [UsageRecord.from_json(orjson.loads(fields[b"data"])) for _, fields in entries]
