"""The small parts of a run: retries, interrupts, the watchdog."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltafan_worker._interrupt import Interrupt, Reason
from deltafan_worker._retry import LONGEST_PAUSE_S, pause_before
from deltafan_worker._upstream_error import UpstreamError
from deltafan_worker._watchdog import Silence, Watchdog
from support.waiting import wait_until


def error(*, retryable: bool = True, retry_after_s: float | None = None) -> UpstreamError:
    return UpstreamError(code="x", message="", retryable=retryable, retry_after_s=retry_after_s)


@given(st.integers(1, 50), st.floats(0, 1))
def test_pauses_double_up_to_a_limit(retry: int, jitter: float) -> None:
    pause = pause_before(retry, error(), max_retries=100, jitter=jitter)
    assert pause is not None
    assert 0.375 <= pause <= LONGEST_PAUSE_S
    assert pause >= 0.75 * min(0.5 * 2 ** (retry - 1), LONGEST_PAUSE_S)


def test_what_may_not_be_retried() -> None:
    assert pause_before(1, error(retryable=False), max_retries=3, jitter=0) is None
    assert pause_before(4, error(), max_retries=3, jitter=0) is None
    assert pause_before(1, error(retry_after_s=600), max_retries=3, jitter=0) is None


def test_the_provider_decides_how_long_to_wait() -> None:
    assert pause_before(1, error(retry_after_s=7), max_retries=3, jitter=1) == 7


async def test_an_interrupt_cuts_only_what_it_runs() -> None:
    interrupt, entered = Interrupt(), asyncio.Event()

    async def work() -> str:
        entered.set()
        await asyncio.Event().wait()
        return "never"

    running = asyncio.create_task(interrupt.run(work()))
    await entered.wait()
    interrupt.cut(Reason.CANCELLED, "why")
    interrupt.cut(Reason.HAND_OVER)
    assert await running is None
    assert (interrupt.reason, interrupt.detail) == (Reason.CANCELLED, "why"), "the first reason stays"
    assert await interrupt.run(work()) is None, "and nothing is begun any more"


async def test_work_that_ends_in_time_gives_its_value() -> None:
    async def work() -> str:
        return "value"

    interrupt = Interrupt()
    assert await interrupt.run(work(), within_s=5) == "value"
    interrupt.cut(Reason.FENCED)
    assert interrupt.reason is Reason.FENCED


async def test_time_that_is_over_is_the_deadline() -> None:
    interrupt = Interrupt()
    assert await interrupt.run(asyncio.Event().wait(), within_s=0.01) is None
    assert interrupt.reason is Reason.DEADLINE


async def test_a_cut_when_the_time_is_just_over_is_harmless() -> None:
    interrupt = Interrupt()

    async def work() -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            interrupt.cut(Reason.CANCELLED)
            raise
        return "never"

    assert await interrupt.run(work(), within_s=0.01) is None
    assert interrupt.reason is Reason.CANCELLED


async def test_errors_of_the_work_come_through() -> None:
    async def work() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await Interrupt().run(work())


async def test_a_cancelled_task_stays_cancelled() -> None:
    interrupt = Interrupt()
    begun = asyncio.Event()

    async def work() -> None:
        begun.set()
        await asyncio.Event().wait()

    running = asyncio.create_task(interrupt.run(work()))
    await begun.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert interrupt.reason is None


async def test_the_watchdog_barks_at_a_silent_start_and_in_the_middle() -> None:
    with pytest.raises(Silence) as first:
        async with Watchdog(0.02, 10):
            await asyncio.Event().wait()
    assert first.value.code == "first_delta_timeout"
    with pytest.raises(Silence) as later:
        async with Watchdog(10, 0.02) as dog:
            dog.fed(has_delta=True)
            await asyncio.Event().wait()
    assert later.value.code == "silence_timeout"


async def test_data_without_a_delta_is_no_beginning() -> None:
    with pytest.raises(Silence) as silence:
        async with Watchdog(0.08, 0.01) as dog:
            dog.fed(has_delta=False)  # a model that says it has begun, and thinks
            await asyncio.Event().wait()
    assert silence.value.code == "first_delta_timeout"
    with pytest.raises(Silence) as silence:
        async with Watchdog(0.03, 10) as dog:

            def feed() -> bool:
                dog.fed(has_delta=False)
                return False

            await wait_until(feed, "for ever")
    assert silence.value.code == "first_delta_timeout", "though there was data all the time"


async def test_a_fed_watchdog_lets_the_block_end() -> None:
    async with Watchdog(0.05, 0.05) as dog:
        fed = iter(range(12))

        def feed() -> bool:
            dog.fed(has_delta=True)
            return next(fed, None) is None

        await wait_until(feed, "more than its limit has passed, in bits below it")


async def test_the_watchdog_lets_other_errors_and_timeouts_through() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01), Watchdog(10, 10):
            await asyncio.Event().wait()
    with pytest.raises(KeyError):
        async with Watchdog(10, 10):
            raise KeyError("x")
