"""The faults. Each hurts the fleet once and puts right what nobody else would."""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeAlias

from redis.exceptions import RedisError

from fleet import LEASE_S, Fleet, follow

Hurt: TypeAlias = Callable[[Fleet], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault and what it needs."""

    hurt: Hurt
    pause_s: float = 0.8
    """Between two of them."""
    persistent: bool = False
    replicated: bool = False
    forgets: bool = False
    """The server loses jobs and bills that it had acknowledged: only what was read is promised to be right."""

    @property
    def name(self) -> str:
        """For people."""
        return self.hurt.__name__.replace("_", " ")


async def nothing(_fleet: Fleet) -> None:
    """The measure for all others."""


async def a_worker_is_killed(fleet: Fleet) -> None:
    """SIGKILL."""
    worker = fleet.pick()
    worker.kill()
    worker.wait()
    fleet.replace(worker)


async def a_worker_is_frozen_and_wakes(fleet: Fleet) -> None:
    """SIGSTOP until its leases are gone, then SIGCONT: a zombie."""
    worker = fleet.pick()
    worker.send_signal(signal.SIGSTOP)
    await asyncio.sleep(LEASE_S * 1.4)
    worker.send_signal(signal.SIGCONT)


async def a_worker_is_drained(fleet: Fleet) -> None:
    """SIGTERM: it hands over what it can not finish."""
    worker = fleet.pick()
    fleet.replace(worker)
    worker.terminate()
    await asyncio.to_thread(worker.wait)


async def the_fleet_is_rolled(fleet: Fleet) -> None:
    """Each worker is drained when its successor is up."""
    for worker in tuple(fleet.workers):
        fleet.replace(worker)
        await asyncio.sleep(1.2)
        worker.terminate()
        await asyncio.to_thread(worker.wait)


async def the_server_restarts_with_its_data(fleet: Fleet) -> None:
    """A crash, an append-only file that is synced always, a start."""
    fleet.valkey.kill()
    await asyncio.sleep(fleet.chance.random() / 2)
    await asyncio.to_thread(fleet.valkey.start)


async def the_server_restarts_empty(fleet: Fleet) -> None:
    """A crash without any persistence."""
    await the_server_restarts_with_its_data(fleet)


async def the_server_is_paused(fleet: Fleet) -> None:
    """It answers nobody for longer than a lease."""
    fleet.valkey.pause()
    await asyncio.sleep(LEASE_S * (0.5 + fleet.chance.random()))
    fleet.valkey.resume()


async def memory_runs_out(fleet: Fleet) -> None:
    """Writes are refused for a while."""
    async with fleet.redis as redis:
        await redis.config_set("maxmemory", "1")
        await asyncio.sleep(0.3 + fleet.chance.random() / 2)
        await redis.config_set("maxmemory", "0")


async def all_connections_are_killed(fleet: Fleet) -> None:
    """CLIENT KILL."""
    async with fleet.redis as redis:
        await redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


async def scripts_are_flushed(fleet: Fleet) -> None:
    """The server forgets every script."""
    async with fleet.redis as redis:
        await redis.script_flush()


async def a_replica_without_the_last_moments_is_promoted(fleet: Fleet) -> None:
    """Replication stops, the primary goes on for a while, the copy takes over; the old one then follows it."""
    assert fleet.spare is not None
    async with fleet.redis as primary, type(fleet.redis).from_url(fleet.spare.url) as copy:
        await copy.replicaof("NO", "ONE")
        await asyncio.sleep(0.2 + fleet.chance.random() * 0.6)
        fleet.valkey, fleet.spare = fleet.spare, fleet.valkey
        fleet.proxy.retarget(fleet.valkey.port)
        del primary
    await follow(fleet.spare, fleet.valkey)


async def the_network_cuts(fleet: Fleet) -> None:
    """All connections at once, with what was on its way."""
    fleet.proxy.cut()


async def the_network_delays(fleet: Fleet) -> None:
    """Everything, for a while."""
    fleet.proxy.delay_s = 0.05
    await asyncio.sleep(0.8)
    fleet.proxy.delay_s = 0.0


async def the_network_holds(fleet: Fleet) -> None:
    """Connections stay open and nothing passes."""
    fleet.proxy.pause()
    await asyncio.sleep(0.3 + fleet.chance.random() * LEASE_S)
    fleet.proxy.resume()


async def a_reply_is_cut_in_the_middle(fleet: Fleet) -> None:
    """The server has executed what its client never learns."""
    fleet.proxy.cut_after_reply_bytes(fleet.chance.randrange(200))


async def answers_are_cut(fleet: Fleet) -> None:
    """In the middle of a frame."""
    await fleet.upstream_faults(*["cut"] * 5)


async def answers_just_end(fleet: Fleet) -> None:
    """Without a finish_reason."""
    await fleet.upstream_faults(*["eof"] * 5)


async def answers_stall_behind_comments(fleet: Fleet) -> None:
    """Alive for the socket, dead for the reader."""
    await fleet.upstream_faults(*["stall"] * 3)


async def answers_turn_into_errors(fleet: Fleet) -> None:
    """Inside a 200."""
    await fleet.upstream_faults(*["error"] * 5)


async def calls_are_refused(fleet: Fleet) -> None:
    """429, 500, 503, and connections that are reset."""
    await fleet.upstream_faults("limit", "down", "broken", "refuse", "limit", "refuse", "down")


async def a_stream_is_deleted(fleet: Fleet) -> None:
    """Under a job that runs."""
    if fleet.running_jobs:
        async with fleet.redis as redis:
            await redis.delete(f"deltafan:{{{fleet.chance.choice(list(fleet.running_jobs))}}}:events")


async def two_workers_get_one_job(fleet: Fleet) -> None:
    """Its lease is taken away while it runs, so another claims it."""
    if not fleet.running_jobs:
        return
    job_id = fleet.chance.choice(list(fleet.running_jobs))
    async with fleet.redis as redis:
        if await redis.delete(f"arq:in-progress:{job_id}"):
            await redis.zadd("deltafan:queue:interactive", {job_id: 1}, xx=True)


FAULTS = (
    Fault(nothing),
    Fault(a_worker_is_killed, 1.2),
    Fault(a_worker_is_frozen_and_wakes, 0.3),
    Fault(a_worker_is_drained, 0.6),
    Fault(the_fleet_is_rolled, 0.5),
    Fault(the_server_restarts_with_its_data, 1.0, persistent=True),
    Fault(the_server_restarts_empty, 1.5, forgets=True),
    Fault(the_server_is_paused, 0.8),
    Fault(memory_runs_out, 0.5),
    Fault(all_connections_are_killed, 0.4),
    Fault(scripts_are_flushed, 0.3),
    Fault(a_replica_without_the_last_moments_is_promoted, 1.0, replicated=True),
    Fault(the_network_cuts, 0.4),
    Fault(the_network_delays, 0.4),
    Fault(the_network_holds, 0.5),
    Fault(a_reply_is_cut_in_the_middle, 0.2),
    Fault(answers_are_cut, 0.5),
    Fault(answers_just_end, 0.5),
    Fault(answers_stall_behind_comments, 0.6),
    Fault(answers_turn_into_errors, 0.5),
    Fault(calls_are_refused, 0.4),
    Fault(a_stream_is_deleted, 0.2),
    Fault(two_workers_get_one_job, 0.2),
)


async def hurt_quietly(fault: Fault, fleet: Fleet) -> None:
    """Hurt; a fault that meets a server which another fault has taken away is as good as none."""
    try:
        await fault.hurt(fleet)
    except (RedisError, OSError, ProcessLookupError):
        await asyncio.sleep(0.05)
