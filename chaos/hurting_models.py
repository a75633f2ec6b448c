"""Faults of the model server; each strikes with the first call that it breaks."""

import asyncio

from fleet import Fleet
from strikes import Strike


async def answers_are_cut(fleet: Fleet, strike: Strike) -> None:
    """In the middle of a frame."""
    await _break_calls(fleet, strike, "faults", ["cut"] * 5)


async def answers_just_end(fleet: Fleet, strike: Strike) -> None:
    """Without a finish_reason."""
    await _break_calls(fleet, strike, "faults", ["eof"] * 5)


async def answers_stall_behind_comments(fleet: Fleet, strike: Strike) -> None:
    """Alive for the socket, dead for the reader."""
    await _break_calls(fleet, strike, "faults", ["stall"] * 3)


async def answers_turn_into_errors(fleet: Fleet, strike: Strike) -> None:
    """Inside a 200."""
    await _break_calls(fleet, strike, "faults", ["error"] * 5)


async def answers_do_not_end(fleet: Fleet, strike: Strike) -> None:
    """They are cut where the job's limit is."""
    await _break_calls(fleet, strike, "faults", ["endless"] * 2)


async def calls_are_refused(fleet: Fleet, strike: Strike) -> None:
    """429, 500, 503, and connections that are reset."""
    await _break_calls(fleet, strike, "faults", ["limit", "down", "broken", "reset", "limit", "reset", "down"])


async def a_storm_of_429(fleet: Fleet, strike: Strike) -> None:
    """Every call is refused for a while."""
    await _break_calls(fleet, strike, "refuse", ["limit", 0.5 + strike.chance.random()])


async def the_model_server_is_away(fleet: Fleet, strike: Strike) -> None:
    """Its port refuses connections, and those that were kept alive are reset."""
    await _break_calls(fleet, strike, "close", 0.3 + strike.chance.random())


async def _break_calls(fleet: Fleet, strike: Strike, path: str, order: object) -> None:
    """Strikes with the first call that is broken."""
    upstream = fleet.upstream
    before = await upstream.broken()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(upstream.order(path, order))
        for _ in range(40):
            await asyncio.sleep(0.05)
            if await upstream.broken() > before:
                strike.lands()
                break
