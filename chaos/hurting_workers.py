"""Faults of worker processes: killed, frozen, drained, at any stage of a job, and with a wrong idea of the time."""

import asyncio
import signal

from fleet import LEASE_S, Fleet, Worker
from stages import STAGES
from strikes import Strike


async def a_worker_is_killed(fleet: Fleet, strike: Strike) -> None:
    """SIGKILL."""
    await _end_worker(fleet, strike, signal.SIGKILL)


async def a_worker_is_drained(fleet: Fleet, strike: Strike) -> None:
    """SIGTERM: it hands over what it can not finish."""
    await _end_worker(fleet, strike, signal.SIGTERM)


async def _end_worker(fleet: Fleet, strike: Strike, number: int) -> None:
    if (worker := await fleet.take_worker(strike.chance)) is None:
        return
    strike.lands()
    await fleet.start_worker()
    await fleet.end(worker, number)


async def a_worker_is_frozen_and_wakes(fleet: Fleet, strike: Strike) -> None:
    """SIGSTOP until its leases are gone, then SIGCONT: a zombie."""
    if (worker := await fleet.take_worker(strike.chance)) is None:
        return
    strike.lands()
    worker.signal(signal.SIGSTOP)
    await _thaw(fleet, worker)


async def _thaw(fleet: Fleet, worker: Worker) -> None:
    await asyncio.sleep(LEASE_S * 1.4)
    worker.signal(signal.SIGCONT)
    # Or one that is frozen again at once takes its own absence for the model's silence, and calls again.
    await asyncio.sleep(1)
    fleet.idle.append(worker)


async def a_worker_is_killed_at_a_stage(fleet: Fleet, strike: Strike) -> None:
    """SIGKILL, by itself, at a stage of one of its jobs: behind the claim, before the end is written and so on."""
    await _end_worker_at_a_stage(fleet, strike, signal.SIGKILL)


async def a_worker_is_drained_at_a_stage(fleet: Fleet, strike: Strike) -> None:
    """SIGTERM there."""
    await _end_worker_at_a_stage(fleet, strike, signal.SIGTERM)


async def _end_worker_at_a_stage(fleet: Fleet, strike: Strike, number: signal.Signals) -> None:
    if (worker := await fleet.take_worker(strike.chance)) is None:
        return
    if await worker.order(f"{number.name} {strike.chance.choice(STAGES)}"):
        strike.lands()
    await fleet.start_worker()
    await fleet.end(worker, number)


async def a_worker_is_frozen_at_a_stage(fleet: Fleet, strike: Strike) -> None:
    """SIGSTOP there, until its leases are gone."""
    if (worker := await fleet.take_worker(strike.chance)) is None:
        return
    if await worker.order(f"SIGSTOP {strike.chance.choice(STAGES)}"):
        strike.lands()
        await _thaw(fleet, worker)
    else:
        fleet.idle.append(worker)


async def the_fleet_is_rolled(fleet: Fleet, strike: Strike) -> None:
    """Each worker is drained when its successor is up."""
    for worker in tuple(fleet.idle):
        # Else a roll that is faster than workers start leaves nobody to work.
        if await fleet.is_up(await fleet.start_worker()) and worker in fleet.idle:  # else another fault has it
            fleet.idle.remove(worker)
            if fleet.is_busy(worker):
                strike.lands()
            await fleet.end(worker, signal.SIGTERM)


async def the_workers_clocks_jump(fleet: Fleet, strike: Strike) -> None:
    """Forward or back by an hour or a day, and later to where they were."""
    shifts = [strike.chance.choice((-86_400, -3_600, 3_600, 86_400)) for _ in fleet.idle]
    workers = tuple(fleet.idle)
    for worker, shift_s in zip(workers, shifts, strict=True):
        if await worker.order(f"clock {shift_s}") and fleet.is_busy(worker):
            strike.lands()
    await asyncio.sleep(strike.chance.random())
    for worker in workers:
        await worker.order("clock 0")
