"""Cool-downs: a provider that asked one worker for less is left alone by all of them for a while.

Kept beside the streams, one short-lived key for each provider's model, since limits are counted per model. What other
workers have learned arrives with the answers to the next commands on the publisher's connection: nobody waits for it.
"""

import math
import time
from collections.abc import Callable, Sequence

from deltafan._keys import Keys
from deltafan._lua import load
from deltafan._resp import Handler, Reply, ignore, pack
from deltafan_worker._route import Route

_COOL_DOWN = load("cool_down", "deltafan_worker", using=())
LONGEST_S = 60.0
"""No single word of a provider silences a fleet for longer; the next refusal renews it."""


class Cooldowns:
    """Who is to be left alone, as far as this worker knows."""

    def __init__(
        self, keys: Keys, send: Callable[[bytes, Handler], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._keys = keys
        self._send = send
        self._clock = clock
        self._until: dict[str, float] = {}

    def refresh(self, routes: Sequence[Route]) -> None:
        """Ask what other workers have learned of these."""
        for key in {self._key(route) for route in routes}:
            self._send(pack("PTTL", key), self._learn(key))

    def note(self, route: Route, pause_s: float) -> None:
        """The provider has asked for less: nobody calls it for `pause_s`."""
        pause_s = min(pause_s, LONGEST_S)
        if pause_s <= self.left_s(route):
            return
        key = self._key(route)
        self._until[key] = self._clock() + pause_s
        self._send(pack("EVAL", _COOL_DOWN.source, 1, key, max(1, math.ceil(pause_s * 1000))), ignore)

    def left_s(self, route: Route) -> float:
        """Seconds for which the provider is still to be left alone; 0 when it is not."""
        key = self._key(route)
        if (until := self._until.get(key)) is None:
            return 0.0
        left_s = until - self._clock()
        if left_s <= 0:
            del self._until[key]
        return max(0.0, left_s)

    def _learn(self, key: str) -> Handler:
        def learn(reply: Reply) -> None:
            if isinstance(reply, int) and reply > 0:
                self._until[key] = max(self._until.get(key, 0.0), self._clock() + reply / 1000)

        return learn

    def _key(self, route: Route) -> str:
        return self._keys.cooldown(route.provider, route.model)
