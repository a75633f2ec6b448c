"""How lanes share a worker's slots."""

from collections import Counter

import pytest

from deltafan_worker._lanes import Shares, Slots

INTERACTIVE, BATCH = 1, 2


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def first_come(slots: Slots, waiting: dict[int, int], running: Counter[int]) -> Counter[int]:
    """What a claim takes, as the script does: each pass up to its bound, all together up to the room."""
    taken: Counter[int] = Counter()
    room = 10 - sum(running.values())
    for index, most in slots.passes(running):
        taken[index] += max(
            0, min(most - taken[index], waiting.get(index, 0) - taken[index], room - sum(taken.values()))
        )
    return taken


@pytest.mark.parametrize(
    ("concurrency", "share", "free"), [(10, 0.1, 1), (100, 0.25, 25), (3, 0.1, 1), (1, 0.5, 0), (4, 0.0, 0)]
)
def test_batch_takes_what_is_idle_but_a_share(concurrency: int, share: float, free: int) -> None:
    slots = Slots(2, concurrency, Shares(interactive=share))
    assert dict(slots.passes(Counter()))[BATCH] == concurrency - free
    if concurrency > free:
        assert slots.passes(Counter({BATCH: concurrency - free})) == ([(INTERACTIVE, free)] if free else [])


def test_interactive_jobs_may_fill_all_slots_and_go_first() -> None:
    slots = Slots(2, 10, Shares())
    assert slots.passes(Counter())[0] == (INTERACTIVE, 10)
    assert first_come(slots, {INTERACTIVE: 50, BATCH: 50}, Counter()) == {INTERACTIVE: 10, BATCH: 0}
    assert first_come(slots, {INTERACTIVE: 2, BATCH: 50}, Counter()) == {INTERACTIVE: 2, BATCH: 8}


def test_batch_jobs_that_a_claim_was_too_small_for_do_not_wait_yet() -> None:
    clock = Clock()
    slots = Slots(2, 100, Shares(batch=0.1, patience_s=5), clock)
    slots.note(Counter({BATCH: 8}), [0, 1])
    clock.now_s += 60
    slots.note(Counter({INTERACTIVE: 20, BATCH: 9}), [1, 1])
    assert slots.passes(Counter({INTERACTIVE: 20, BATCH: 9}))[0][0] == INTERACTIVE
    slots.note(Counter({INTERACTIVE: 91, BATCH: 9}), [1, 1])
    clock.now_s += 5
    assert slots.passes(Counter({INTERACTIVE: 90, BATCH: 9}))[0] == (BATCH, 1)


def test_batch_jobs_that_waited_long_enough_go_first_up_to_their_share() -> None:
    clock = Clock()
    slots = Slots(2, 10, Shares(batch=0.2, patience_s=5), clock)
    full = Counter({INTERACTIVE: 10})
    slots.note(full, [1, 1])
    clock.now_s += 4.9
    assert first_come(slots, {INTERACTIVE: 50, BATCH: 50}, Counter({INTERACTIVE: 7}))[BATCH] == 0
    slots.note(full, [1, 1])
    clock.now_s += 0.1
    assert first_come(slots, {INTERACTIVE: 50, BATCH: 50}, Counter({INTERACTIVE: 7})) == {BATCH: 2, INTERACTIVE: 1}
    assert first_come(slots, {INTERACTIVE: 50, BATCH: 50}, Counter({INTERACTIVE: 6, BATCH: 1}))[BATCH] == 1
    slots.note(Counter({INTERACTIVE: 8, BATCH: 2}), [1, 1])
    assert first_come(slots, {INTERACTIVE: 50, BATCH: 50}, Counter({INTERACTIVE: 8}))[BATCH] == 2, "and keep it"
    slots.note(Counter({INTERACTIVE: 8, BATCH: 2}), [1, 0])
    slots.note(Counter({INTERACTIVE: 10}), [1, 1])
    assert first_come(slots, {INTERACTIVE: 50, BATCH: 50}, Counter({INTERACTIVE: 8}))[BATCH] == 0, (
        "patience begins anew with the next that wait"
    )


def test_short_batch_jobs_get_their_share_of_a_worker_that_is_full_for_long() -> None:
    clock = Clock()
    slots = Slots(2, 10, Shares(batch=0.2, patience_s=5), clock)
    had = 0
    for _ in range(200):  # each job takes half a second
        taken = first_come(slots, {INTERACTIVE: 50, BATCH: 50}, Counter())
        slots.note(taken, [1, 1])
        had += taken[BATCH]
        clock.now_s += 0.5
    assert had == 2 * (200 - 10)


def test_a_worker_of_one_slot_serves_both_in_the_end() -> None:
    clock = Clock()
    slots = Slots(2, 1, Shares(interactive=0.5, batch=0.1, patience_s=1), clock)
    assert slots.passes(Counter()) == [(INTERACTIVE, 1), (BATCH, 1)]
    slots.note(Counter({INTERACTIVE: 1}), [1, 1])
    clock.now_s += 1
    assert slots.passes(Counter())[0] == (BATCH, 1)


def test_without_a_share_batch_jobs_wait_for_ever() -> None:
    clock = Clock()
    slots = Slots(2, 10, Shares(batch=0), clock)
    slots.note(Counter({INTERACTIVE: 10}), [1, 1])
    clock.now_s += 1e6
    assert slots.passes(Counter({INTERACTIVE: 9})) == [(INTERACTIVE, 1), (BATCH, 1)]
    assert first_come(slots, {INTERACTIVE: 50, BATCH: 50}, Counter({INTERACTIVE: 9}))[BATCH] == 0


def test_one_lane_alone_has_all_slots() -> None:
    assert Slots(1, 10, Shares(interactive=0.5)).passes(Counter({1: 4})) == [(1, 6)]


def test_a_full_worker_looks_at_no_queue() -> None:
    """Else it would take the rings of jobs that others have room for."""
    for queues in (1, 2):
        assert Slots(queues, 10, Shares()).passes(Counter({1: 10})) == []
