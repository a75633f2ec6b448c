"""Faults of the Redis server, of the network before it, and of what it holds of a job that runs."""

import asyncio
import time
from typing import Any

from fleet import LEASE_S, Fleet, follow
from scripts import CLOCK
from strikes import Strike

CLOCK_JUMP_S = 3


async def the_servers_clock_is_set_back(fleet: Fleet, strike: Strike) -> None:
    """Attempts of jobs lie in the future when it is, and then their streams are lost.

    A process can not set the clock of another, so this one is set for the worker's scripts alone (scripts.py); what
    the server itself times, the lifetimes of keys, goes on as before.
    """
    async with fleet.redis as redis:
        try:
            await redis.set(CLOCK, CLOCK_JUMP_S)
            await asyncio.sleep(0.6)
        finally:
            await redis.delete(CLOCK)
        for job_id in tuple(fleet.running):
            attempt = int(await _reply(redis.hget(f"deltafan:{{{job_id}}}:state", "attempt")) or 0)
            if attempt > time.time() * 1000 and await redis.delete(f"deltafan:{{{job_id}}}:events"):
                strike.lands()


async def the_server_restarts_with_its_data(fleet: Fleet, strike: Strike) -> None:
    """A crash, an append-only file that is synced always, a start."""
    strike.lands()
    fleet.valkey.kill()
    await asyncio.sleep(strike.chance.random() / 2)
    await asyncio.to_thread(fleet.valkey.start)


async def the_server_restarts_empty(fleet: Fleet, strike: Strike) -> None:
    """A crash without any persistence."""
    await the_server_restarts_with_its_data(fleet, strike)


async def the_server_is_paused(fleet: Fleet, strike: Strike) -> None:
    """It answers nobody, mostly for longer than a lease."""
    strike.lands()
    fleet.valkey.pause()
    await asyncio.sleep(LEASE_S * (0.5 + strike.chance.random()))
    fleet.valkey.resume()


async def memory_runs_out(fleet: Fleet, strike: Strike) -> None:
    """Writes are refused for a while."""
    async with fleet.redis as redis:
        await redis.config_set("maxmemory", "1")
        strike.lands()
        await asyncio.sleep(0.3 + strike.chance.random() / 2)
        await redis.config_set("maxmemory", "0")


async def all_connections_are_killed(fleet: Fleet, strike: Strike) -> None:
    """CLIENT KILL, those that listen for bells and cancels too."""
    async with fleet.redis as redis:
        for kind in ("pubsub", "normal"):
            if await redis.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes"):
                strike.lands()


async def scripts_are_flushed(fleet: Fleet, strike: Strike) -> None:
    """The server forgets every script."""
    async with fleet.redis as redis:
        await redis.script_flush()
        if fleet.running:
            strike.lands()


async def a_replica_without_the_last_moments_is_promoted(fleet: Fleet, strike: Strike) -> None:
    """Replication stops, the primary goes on for a while, the copy takes over; the old one then follows it."""
    assert fleet.spare is not None
    async with type(fleet.redis).from_url(fleet.spare.url) as copy:
        await copy.replicaof("NO", "ONE")
    await asyncio.sleep(0.2 + strike.chance.random() * 0.6)
    strike.lands()
    fleet.valkey, fleet.spare = fleet.spare, fleet.valkey
    fleet.proxy.retarget(fleet.valkey.port)
    await follow(fleet.spare, fleet.valkey)


async def the_network_cuts(fleet: Fleet, strike: Strike) -> None:
    """All connections at once, with what was on its way."""
    if fleet.proxy.open:
        strike.lands()
    fleet.proxy.cut()


async def the_network_delays(fleet: Fleet, strike: Strike) -> None:
    """Everything, for a while."""
    strike.lands()
    fleet.proxy.delay_s = 0.05
    await asyncio.sleep(0.8)
    fleet.proxy.delay_s = 0.0


async def the_network_holds(fleet: Fleet, strike: Strike) -> None:
    """Connections stay open and nothing passes."""
    strike.lands()
    fleet.proxy.pause()
    await asyncio.sleep(0.3 + strike.chance.random() * LEASE_S)
    fleet.proxy.resume()


async def a_reply_is_cut_in_the_middle(fleet: Fleet, strike: Strike) -> None:
    """The server has executed what its client never learns."""
    fleet.proxy.cut_after_reply_bytes(strike.chance.randrange(200))
    async with asyncio.timeout(2):
        while fleet.proxy.is_about_to_cut:
            await asyncio.sleep(0.01)
    strike.lands()


async def a_stream_is_deleted(fleet: Fleet, strike: Strike) -> None:
    """Under a job that runs."""
    if fleet.running:
        job_id = strike.chance.choice(list(fleet.running))
        async with fleet.redis as redis:
            if await redis.delete(f"deltafan:{{{job_id}}}:events"):
                strike.lands()


async def two_workers_get_one_job(fleet: Fleet, strike: Strike) -> None:
    """Its lease is taken away while it runs; strikes when another has claimed it."""
    if not fleet.running:
        return
    job_id = strike.chance.choice(list(fleet.running))
    lease = f"arq:in-progress:{job_id}"
    async with fleet.redis as redis:
        before = await redis.get(lease)
        if before is None or not await redis.delete(lease):
            return
        for lane in ("interactive", "batch"):
            if await redis.zadd(f"deltafan:queue:{lane}", {job_id: 1}, xx=True, ch=True):
                await _reply(redis.lpush(f"deltafan:queue:{lane}:bell", "1"))
        for _ in range(30):
            await asyncio.sleep(0.02)
            if await redis.get(lease) not in (None, before):
                strike.lands()
                return


async def _reply(command: Any) -> Any:
    """Of a command whose type in redis-py is that of both its clients."""
    return await command
