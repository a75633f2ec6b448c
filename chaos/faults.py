"""The faults. Each hurts the fleet once, says when it has struck, and puts right what nobody else would."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeAlias

from redis.exceptions import RedisError

import hurting_models as models
import hurting_servers as servers
import hurting_workers as workers
from fleet import Fleet
from strikes import Strike

PAGES = 2_000
"""What a reader that does not read holds at most."""

Hurt: TypeAlias = Callable[[Fleet, Strike], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault and what it needs."""

    hurt: Hurt
    pause_s: float = 0.4
    """Between two of them."""
    persistent: bool = False
    replicated: bool = False
    forgets: bool = False
    """The server loses jobs and bills that it had acknowledged: only what was read is promised to be right."""
    owns: str = ""
    """`server` or `models`: no other that does may strike at the same time, or soon after."""
    spares_runs: bool = False
    """It may not cost a job one of its runs."""

    @property
    def name(self) -> str:
        """For people."""
        return self.hurt.__name__.replace("_", " ")


async def nothing(_fleet: Fleet, _strike: Strike) -> None:
    """The measure for all others."""


async def a_reader_stops_reading(fleet: Fleet, strike: Strike) -> None:
    """With its tail open, until what it has not read is more than a tail holds: the pressure reaches the server."""
    fleet.reads_on.clear()
    try:
        async with fleet.redis as redis:
            for _ in range(25):
                await asyncio.sleep(0.1)
                for job_id, transcript in tuple(fleet.stopping.items()):
                    length = await redis.xlen(f"deltafan:{{{job_id}}}:events")
                    if length > transcript.taken + PAGES + 100:
                        strike.lands()
                if strike.at is not None:
                    break
    finally:
        fleet.reads_on.set()


FAULTS = (
    Fault(nothing, spares_runs=True),
    Fault(workers.a_worker_is_killed, 0.8),
    Fault(workers.a_worker_is_killed_at_a_stage),
    Fault(workers.a_worker_is_frozen_and_wakes, 0.2),
    Fault(workers.a_worker_is_frozen_at_a_stage, 0.2),
    Fault(workers.a_worker_is_drained, spares_runs=True),
    Fault(workers.a_worker_is_drained_at_a_stage, spares_runs=True),
    Fault(workers.the_fleet_is_rolled, spares_runs=True),
    Fault(workers.the_workers_clocks_jump, spares_runs=True),
    Fault(servers.the_servers_clock_is_set_back),
    Fault(servers.the_server_restarts_with_its_data, 0.8, persistent=True, owns="server"),
    Fault(servers.the_server_restarts_empty, 1.2, forgets=True, owns="server"),
    Fault(servers.the_server_is_paused, owns="server"),
    Fault(servers.memory_runs_out, owns="server"),
    Fault(servers.all_connections_are_killed),
    Fault(servers.scripts_are_flushed, 0.3, spares_runs=True),
    Fault(servers.a_replica_without_the_last_moments_is_promoted, 0.8, replicated=True, owns="server"),
    Fault(servers.the_network_cuts),
    Fault(servers.the_network_delays, spares_runs=True),
    Fault(servers.the_network_holds),
    Fault(servers.a_reply_is_cut_in_the_middle, 0.2),
    Fault(models.answers_are_cut),
    Fault(models.answers_just_end),
    Fault(models.answers_stall_behind_comments),
    Fault(models.answers_turn_into_errors),
    Fault(models.answers_do_not_end),
    Fault(models.calls_are_refused),
    Fault(models.a_storm_of_429, owns="models"),
    Fault(models.the_model_server_is_away, owns="models"),
    Fault(a_reader_stops_reading, spares_runs=True),
    Fault(servers.a_stream_is_deleted, 0.2),
    Fault(servers.two_workers_get_one_job, 0.2),
)


async def strike(fault: Fault, fleet: Fleet, chance: random.Random) -> float | None:
    """Hurt, and say when it struck.

    A fault that meets a server which another has taken away is as good as none, unless it had struck before.
    """
    under_way = Strike(chance)
    try:
        await fault.hurt(fleet, under_way)
    except (RedisError, OSError, RuntimeError):  # a TimeoutError is an OSError, uvloop's lost connection a RuntimeError
        await asyncio.sleep(0.05)
    return under_way.at
