import asyncio

import pytest

from deltafan.testing import simulated_delay
from support.waiting import wait_until


async def test_it_returns_when_a_plain_predicate_holds() -> None:
    answers = iter([0, "", None, "yes"])
    await wait_until(lambda: next(answers), "the fourth answer")
    assert list(answers) == []


async def test_it_awaits_a_predicate_that_is_a_coroutine_and_takes_its_value() -> None:
    answers = iter([False, True])

    async def holds() -> bool:
        return next(answers)

    await wait_until(holds, "the second answer")
    assert list(answers) == []


async def test_it_fails_in_time_and_says_what_it_waited_for() -> None:
    loop = asyncio.get_running_loop()
    started = loop.time()
    with pytest.raises(AssertionError, match=r"not within 0\.05 s: pigs fly"):
        await wait_until(lambda: False, "pigs fly", timeout_s=0.05)
    assert loop.time() - started < 1


async def test_a_predicates_own_error_is_not_swallowed() -> None:
    with pytest.raises(ZeroDivisionError):
        await wait_until(lambda: 1 / 0, "nothing")


async def test_a_simulated_delay_takes_its_time() -> None:
    loop = asyncio.get_running_loop()
    started = loop.time()
    await simulated_delay(0.05)
    assert loop.time() - started > 0.049
