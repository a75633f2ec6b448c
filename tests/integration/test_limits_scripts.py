"""The limits' scripts, one at a time: what each leaves behind."""

from collections.abc import Iterator
from typing import Any

import pytest
import redis

from deltafan._lua import load
from support.valkey import Valkey

PREFIX, GROUP, QUEUE = "deltafan:limit:", "p/m", "deltafan:queue:batch"
LOT = f"{QUEUE}:lot:{GROUP}"
COMMON = (PREFIX, 0.1)


class Limits:
    """Runs the scripts as a worker does."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def _run(self, name: str, keys: tuple[str, ...], *args: Any) -> Any:
        script = load(name, "deltafan_worker", using=("limits",))
        return self.client.eval(script.source, len(keys), *keys, *COMMON, *args)

    def ask(self, job: str, *, line: str = "", tokens: int = 100, concurrency: int | str = "") -> list[int]:
        numbers = ("", "", "", "", "", concurrency)
        return list(self._run("ask", (), GROUP, 0, tokens, 0, job, line, *numbers))

    def settle(self, job: str, grant: list[int], used: int) -> None:
        self._run("settle", (QUEUE,), GROUP, job, *grant[1:], used, used, 1)

    def park(self, job: str, score: int) -> int:
        self.client.set(f"arq:in-progress:{job}", "token", px=5000)
        return int(self._run("park", (QUEUE,), GROUP, 100, "token", job, score, ""))

    def claim(self, room: int) -> list[str]:
        _, flat, *_ = self._run("claim", (QUEUE,), "process", 5000, room, 0, 0, 1, room)
        return [raw.decode() for raw in flat[::5]]

    def enqueue(self, job: str, tenant: str) -> float:
        script = load("enqueue_only", using=("enqueue",))
        keys = (f"arq:job:{job}", f"arq:in-progress:{job}", f"arq:result:{job}", QUEUE, f"{QUEUE}:bell")
        self.client.eval(script.source, 5, *keys, job, "{}", 60_000, 0, 1, tenant, "")
        return float(self.client.zscore(QUEUE, job))

    def tokens(self) -> int:
        cells = self.client.hgetall(PREFIX + GROUP)
        return sum(int(value) for name, value in cells.items() if name[:1] == b"t" and name[1:].isdigit())


@pytest.fixture
def limits(valkey: Valkey) -> Iterator[Limits]:
    with redis.Redis.from_url(valkey.url) as client:
        client.flushall()
        yield Limits(client)
        client.flushall()


@pytest.mark.parametrize("used", [0, 40, 100, 300])
def test_tokens_are_corrected_up_and_down(used: int, limits: Limits) -> None:
    limits.settle("j", limits.ask("j"), used)
    assert limits.tokens() == used


def test_a_place_that_is_free_rings_for_those_in_line_once(limits: Limits) -> None:
    limits.client.set("arq:in-progress:j", "token", px=5000)  # a place is held by who has a lease
    grant = limits.ask("j", concurrency=1)
    assert limits.ask("k", concurrency=1)[0] == 0
    limits.enqueue("k", "a")
    limits.park("k", 2)
    limits.client.delete(f"{QUEUE}:bell")
    limits.settle("j", grant, 10)
    assert limits.client.llen(f"{QUEUE}:bell") == 1
    limits.settle("j", grant, 10)
    assert limits.client.llen(f"{QUEUE}:bell") == 1, "nothing was freed by that"


def test_nobody_overtakes_those_in_line_but_a_job_that_has_begun(limits: Limits) -> None:
    limits.enqueue("first", "a")
    limits.park("first", 2)
    assert limits.ask("late", line=QUEUE)[0] == 0
    assert limits.ask("begun")[0] == 1


def test_a_job_that_steps_back_again_keeps_its_place(limits: Limits) -> None:
    limits.enqueue("j", "a")
    limits.park("j", 3)
    limits.park("j", 9)
    assert limits.client.zscore(LOT, "j") == 3


def test_those_in_line_leave_half_of_the_room_to_the_others(limits: Limits) -> None:
    for number in range(8):
        limits.enqueue(f"waits-{number}", "a")
        limits.park(f"waits-{number}", number + 2)
    for number in range(8):
        limits.enqueue(f"new-{number}", "b")
    taken = limits.claim(4)
    assert sorted(name.split("-")[0] for name in taken) == ["new", "new", "waits", "waits"]


def test_a_tenants_next_place_is_behind_its_jobs_in_line(limits: Limits) -> None:
    places = [limits.enqueue(f"waits-{number}", "a") for number in range(3)]
    for number, place in enumerate(places):
        limits.park(f"waits-{number}", int(place))
    assert limits.enqueue("next", "a") == places[-1] + 1
    assert limits.enqueue("another", "b") == places[0]
