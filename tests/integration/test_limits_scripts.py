"""The limits' scripts, one at a time: what each leaves behind."""

from collections.abc import Iterator
from typing import Any

import pytest
import redis

from deltafan._lua import load
from support.limits import PASS
from support.valkey import Valkey
from support.waiting import wait_until

PREFIX, GROUP, QUEUE = "deltafan:limit:", "p/m", "deltafan:queue:batch"
LOT = f"{QUEUE}:lot:{GROUP}"
COMMON = (PREFIX, 0.1)


class Limits:
    """Runs the scripts as a worker does."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.told = 0
        self.left: list[int] = []
        """Whether the last claim has left due jobs."""

    def _run(self, name: str, keys: tuple[str, ...], *args: Any) -> Any:
        script = load(name, "deltafan_worker", using=("limits",))
        return self.client.eval(script.source, len(keys), *keys, *COMMON, *args)

    def ask(
        self,
        job: str,
        *,
        line: str = "",
        tokens: int | str = 100,
        concurrency: int | str = "",
        tpm: int | str = "",
        rpm: int | str = "",
    ) -> list[int]:
        numbers = ("", "", "", rpm, tpm, concurrency)
        return list(self._run("ask", (), GROUP, 0, tokens, 1, job, line, *numbers))

    def settle(
        self, job: str, grant: list[int], used: int | str, *, made: bool = True, is_repeat: bool = False
    ) -> None:
        self.told += not is_repeat
        given = (*grant[1:3], used, used, int(made), grant[3], int(made), "process", self.told)
        self._run("settle", (QUEUE,), GROUP, job, *given)

    def park(self, job: str, score: int, tokens: int = 100) -> int:
        self.client.set(f"arq:in-progress:{job}", "token", px=5000)
        return int(self._run("park", (QUEUE,), GROUP, f"{tokens} 0", "token", job, score, ""))

    def claim(self, want: int, *, cautious: bool = False, slots: int | None = None) -> list[str]:
        slots = want if slots is None else slots
        _, flat, self.left, *_ = self._run("claim", (QUEUE,), "process", 5000, want, int(cautious), 0, 1, slots)
        return [raw.decode() for raw in flat[::7]]

    def enqueue(self, job: str, tenant: str, record_bytes: int = 2) -> float:
        script = load("enqueue_only", using=("enqueue",))
        keys = (f"arq:job:{job}", f"arq:in-progress:{job}", f"arq:result:{job}", QUEUE, f"{QUEUE}:bell")
        self.client.eval(script.source, 5, *keys, job, "x" * record_bytes, 60_000, 0, 1, tenant, "")
        return float(self.client.zscore(QUEUE, job))

    def tokens(self) -> int:
        return self._used(b"t")

    def requests(self) -> int:
        return self._used(b"r")

    def _used(self, kind: bytes) -> int:
        cells = self.client.hgetall(PREFIX + GROUP)
        return sum(int(value) for name, value in cells.items() if name[:1] == kind and name[1:].isdigit())


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


def test_a_call_that_was_not_made_counts_for_nothing_and_lets_the_next_look(limits: Limits) -> None:
    grant = limits.ask("j", rpm=1)
    assert limits.ask("k", rpm=1)[0] == 0
    limits.enqueue("k", "a")
    limits.park("k", 2)
    limits.client.delete(f"{QUEUE}:bell")
    limits.settle("j", grant, 0, made=False)
    assert (limits.requests(), limits.tokens(), limits.client.llen(f"{QUEUE}:bell")) == (0, 0, 1)
    assert limits.claim(1) == ["k"]


def test_what_is_told_twice_counts_once(limits: Limits) -> None:
    """The answer to it was lost, so it was told again."""
    for job, used, made in (("j", 300, True), ("k", 0, False)):
        grant = limits.ask(job)
        limits.settle(job, grant, used, made=made)
        before = limits.client.hgetall(PREFIX + GROUP)
        limits.settle(job, grant, used, made=made, is_repeat=True)
        assert limits.client.hgetall(PREFIX + GROUP) == before


def test_as_long_as_nothing_is_known_of_a_model_its_calls_count_as_long_as_they_may_be(limits: Limits) -> None:
    grants = [limits.ask(f"j{number}", tokens=4000, tpm=10_000) for number in range(5)]
    assert [grant[0] for grant in grants] == [1, 1, 0, 0, 0]
    limits.settle("j0", grants[0], 1000)
    assert limits.ask("short", tokens=4000, tpm=10_000)[:3:2] == [1, 1000]


@pytest.mark.parametrize("used", [100, ""])
def test_unbounded_calls_of_a_model_of_which_nothing_is_known_are_few_until_one_has_ended(
    used: int | str, limits: Limits
) -> None:
    grants = [limits.ask(f"j{number}", tokens="", tpm=20_000) for number in range(5)]
    assert [grant[0] for grant in grants] == [1, 1, 0, 0, 0]
    limits.settle("j0", grants[0], used)
    assert limits.ask("next", tokens="", tpm=20_000)[2] < 1000, "also when the provider does not count"


def test_the_first_answers_weigh_alike_so_that_the_shortest_does_not_speak_for_all(limits: Limits) -> None:
    for number, used in enumerate((10, 1000, 1990)):
        limits.settle(f"j{number}", limits.ask(f"j{number}"), used)
    assert limits.ask("next", tokens="")[2] == 1000


def test_who_waits_in_line_is_expected_to_use_what_answers_use_now(limits: Limits) -> None:
    grant = limits.ask("first", tokens="", tpm=9000)
    for number in range(3):
        limits.enqueue(f"waits-{number}", "a")
        limits.client.set(f"arq:in-progress:waits-{number}", "token", px=5000)
        limits._run("park", (QUEUE,), GROUP, "10 ", "token", f"waits-{number}", number + 2, "")
    assert limits.claim(3) == []
    limits.settle("first", grant, 90)
    assert limits.claim(3) == ["waits-0", "waits-1", "waits-2"]
    assert limits.tokens() == 90 + 3 * 100


@pytest.mark.parametrize("others", ["in line", "in the queue"])
def test_a_job_whose_worker_died_waits_at_the_head_of_the_line(others: str, limits: Limits) -> None:
    places = {job: int(limits.enqueue(job, "a")) for job in ("begun", "next", "last")}
    if others == "in line":
        for job in ("next", "last"):
            limits.park(job, places[job])
    now_ms = int(limits.client.time()[0] * 1000)
    limits.client.zadd(QUEUE, {"begun": now_ms})
    limits.park("begun", now_ms)
    assert limits.client.zscore(LOT, "begun") == places["next"]
    for job in ("next", "last"):
        limits.park(job, places[job])
    assert limits.claim(1) == ["begun"]


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


@pytest.mark.parametrize(
    ("record_bytes", "want", "slots"), [(2, 4, 4), (2, 4, 100), (300_000, 8, 8)], ids=["slots", "claim", "bytes"]
)
def test_those_in_line_leave_half_of_the_room_to_the_others(
    limits: Limits, record_bytes: int, want: int, slots: int
) -> None:
    """Of what there is least of: free slots, a claim's jobs, its bytes."""
    for number in range(8):
        limits.enqueue(f"waits-{number}", "a", record_bytes)
        limits.park(f"waits-{number}", number + 2)
    for number in range(8):
        limits.enqueue(f"new-{number}", "b", record_bytes)
    taken = limits.claim(want, slots=slots)
    assert sorted(name.split("-")[0] for name in taken) == ["new", "new", "waits", "waits"]


def test_a_tenants_next_place_is_behind_its_jobs_in_line(limits: Limits) -> None:
    places = [limits.enqueue(f"waits-{number}", "a") for number in range(3)]
    for number, place in enumerate(places):
        limits.park(f"waits-{number}", int(place))
    assert limits.enqueue("next", "a") == places[-1] + 1
    assert limits.enqueue("another", "b") == places[0]


def test_a_call_gives_back_its_own_place_only(limits: Limits) -> None:
    """A job may be at its next call before the end of its last one is told, or be told it twice."""
    limits.client.set("arq:in-progress:j", "token", px=5000)
    first = limits.ask("j", concurrency=2)
    limits.ask("j", concurrency=2)
    limits.settle("j", first, 10)
    limits.settle("j", first, 10)
    assert limits.client.scard(f"{PREFIX}{GROUP}:running") == 1


def test_a_worker_that_was_cut_off_takes_from_a_line_what_it_has_room_for(limits: Limits) -> None:
    for number in range(8):
        limits.enqueue(f"waits-{number}", "a")
        limits.client.set(f"arq:retry:waits-{number}", 1, px=5000)
        limits.park(f"waits-{number}", number + 2)
    assert limits.claim(2, cautious=True) == ["waits-0", "waits-1"]
    assert limits.client.zcard(LOT) == 6


def test_jobs_in_line_that_have_room_count_as_waiting(limits: Limits) -> None:
    for number in range(2):
        limits.enqueue(f"waits-{number}", "a")
        limits.park(f"waits-{number}", number + 2)
    limits.claim(1)
    assert limits.left == [1]
    limits.claim(1)
    assert limits.left == [0]


async def test_one_free_slot_is_given_to_the_line_and_to_the_others_in_turn(limits: Limits) -> None:
    for number in range(400):
        limits.enqueue(f"waits-{number}", "a")
        limits.park(f"waits-{number}", number + 2)
    for number in range(400):
        limits.enqueue(f"new-{number}", "b")
    kinds: set[str] = set()

    def both() -> bool:
        kinds.update(name.split("-")[0] for name in limits.claim(1))
        return len(kinds) == 2

    await wait_until(both, "both kinds are taken")
    assert limits.client.zcard(LOT) > 100


def test_a_large_job_that_others_keep_from_running_lets_the_small_ones_pass(limits: Limits) -> None:
    limits.ask("outside", tokens=600, tpm=1000)
    for job, score, tokens in (("large", 2, 800), ("small", 3, 100)):
        limits.enqueue(job, "a")
        limits.park(job, score, tokens)
    limits.client.eval(PASS, 0, 10)
    assert limits.claim(2) == [], "it may use up the minute, once that is over"
    limits.client.hset(f"{LOT}:tokens", " head", "1 large")
    assert limits.claim(2) == ["small"]
    assert limits.client.zrange(LOT, 0, -1) == [b"large"]


def test_who_takes_the_last_of_what_was_rung_for_silences_the_bell(limits: Limits) -> None:
    bell = f"{QUEUE}:bell"
    for job in "abc":
        limits.enqueue(job, "t")
        limits.client.lpush(bell, 1)
    assert limits.claim(2) == ["a", "b"]
    assert limits.client.llen(bell) == 3, "another is to come for the third"
    assert limits.claim(2, slots=0) == []
    assert limits.client.llen(bell) == 3, "whoever has no room leaves it to those that have"
    assert limits.claim(1) == ["c"]
    assert limits.client.llen(bell) == 3, "and who is full now does not wait for the next that is due"
    assert limits.claim(2) == []
    assert limits.client.llen(bell) == 0
    limits.enqueue("d", "t")
    limits.client.lpush(bell, 1)
    assert limits.claim(2) == ["d"]
    assert limits.client.llen(bell) == 0


async def test_a_job_in_line_that_has_room_now_is_still_rung_for(limits: Limits) -> None:
    """As the small one has, once the large one before it has stepped back."""

    def is_first_half_of_an_even_second() -> bool:  # when a single slot is not the line's first
        second, microsecond = limits.client.time()
        return bool(second % 2 == 0 and microsecond < 500_000)

    limits.ask("outside", tokens=600, tpm=1000)
    for job, score, tokens in (("large", 2, 800), ("small", 3, 100)):
        limits.enqueue(job, "a")
        limits.park(job, score, tokens)
    limits.client.eval(PASS, 0, 10)
    limits.client.hset(f"{LOT}:tokens", " head", "1 large")
    limits.client.lpush(f"{QUEUE}:bell", 1)
    await wait_until(is_first_half_of_an_even_second, "it is time")
    assert limits.claim(1) == []
    assert limits.left == [1]
    assert limits.client.exists(f"{QUEUE}:bell")
