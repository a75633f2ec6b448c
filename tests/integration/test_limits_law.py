"""The law of the limits: in no minute more than allowed, and nobody refused without need; against a plain list."""

from dataclasses import dataclass, field
from typing import Any

import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltafan._lua import load
from support.limits import PASS
from support.valkey import Valkey

PREFIX, GROUP = "deltafan:limit:", "p/m"
RESERVE = 0.1


@dataclass
class Sut:
    """The scripts, and the times and sizes of the calls they allowed; the clock is moved by ageing what they know."""

    client: Any
    rpm: int
    tpm: int
    now_s: float = 0.0
    calls: list[tuple[float, int, bool]] = field(default_factory=list)

    def ask(self, tokens: int, *, urgent: bool) -> tuple[int, int]:
        script = load("ask", "deltafan_worker", using=("limits",))
        numbers = (self.rpm, self.tpm, "", "", "", "")
        args = (PREFIX, RESERVE, GROUP, 0, tokens, int(urgent), "j", "", *numbers)
        allowed, second, counted, _ = self.client.eval(script.source, 0, *args)
        assert counted == tokens
        return allowed, second

    def used(self, within_s: float) -> tuple[int, int]:
        late = [size for at, size, _ in self.calls if at > self.now_s - within_s]
        return len(late), sum(late)


steps = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 400), st.booleans()), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rpm=st.integers(1, 12), tpm=st.integers(300, 2000), steps=steps)
def test_no_minute_has_more_than_allowed(valkey: Valkey, rpm: int, tpm: int, steps: list[Any]) -> None:
    with redis.Redis.from_url(valkey.url) as client:
        client.flushall()
        sut = Sut(client, rpm, tpm)
        for pause_s, tokens, urgent in steps:
            pass_time(client, pause_s)
            sut.now_s += pause_s
            allowed, _ = sut.ask(tokens, urgent=urgent)
            requests, used = sut.used(59)
            if allowed:
                assert requests + 1 <= rpm
                assert used == 0 or used + tokens <= tpm
                sut.calls.append((sut.now_s, tokens, urgent))
            elif urgent:
                requests, used = sut.used(63)
                assert requests + 1 > rpm or used + tokens > tpm, "there was room"


def pass_time(client: Any, seconds: int) -> None:
    client.eval(PASS, 0, seconds)
