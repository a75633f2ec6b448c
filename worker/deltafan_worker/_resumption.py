"""Going on with an answer that broke off: what there is of it, and which provider can give the rest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from deltafan._events import CONTENT, Delta
from deltafan._fold import Fold
from deltafan._follow import Follower, RawEntry
from deltafan_worker._apis import continued
from deltafan_worker._background import ResponseNote
from deltafan_worker._publisher import Publisher
from deltafan_worker._route import Route
from deltafan_worker._writer import Broken

_PAGE = 1000


@dataclass(frozen=True, slots=True)
class Leftover:
    """What an earlier attempt has left to go on from: the beginning of its answer, its response upstream, or both."""

    broken: Broken | None = None
    response: ResponseNote | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """How an attempt comes by its answer."""

    routes: Sequence[Route]
    body: Mapping[str, Any] = field(repr=False)
    broken: Broken | None = None
    """It goes on after this, and readers keep it."""
    response: ResponseNote | None = None
    """It reads on in this response, and no model is called."""

    @property
    def published(self) -> Sequence[Delta]:
        """What of its answer is in the stream already."""
        return self.broken.deltas if self.broken else ()


def plan_onwards(routes: Sequence[Route], body: Mapping[str, Any], leftover: Leftover) -> Plan | None:
    """How to go on from what is left; None when no provider can."""
    broken, note = leftover.broken, leftover.response
    if note is not None:
        for route in routes:
            if route.in_background and route.provider == note.provider:
                return Plan((route,), body, broken, note)
    # None of them takes the beginning of a tool call, of speech or of a thought: only of a text.
    if broken is None or any(delta.type != CONTENT for delta in broken.deltas):
        return None
    for route in routes:
        if route.continuation not in (None, "background"):
            said = b"".join(delta.data for delta in broken.deltas).decode()
            return Plan((route,), continued(route, body, said), broken)
    return None


async def read_leftover(publisher: Publisher, events_key: str, state_key: str) -> Leftover:
    """What an earlier worker has left of this job."""
    response = await publisher.ask("HGET", state_key, "response")
    note = ResponseNote.parse(response.decode()) if response else None
    return Leftover(await _read_broken(publisher, events_key), note)


async def _read_broken(publisher: Publisher, events_key: str) -> Broken | None:
    """What there is of an answer in the stream; None when there is nothing.

    Read like any reader would, so what lies behind a hole is not taken. `begin` then refuses a position that is not the
    stream's last.
    """
    follower, folding = Follower(), Fold()
    while True:
        page = await publisher.ask("XRANGE", events_key, follower.range_start, "+", "COUNT", _PAGE)
        for event in follower.take(cast(list[RawEntry], page)):
            folding.add(event)
        if len(page) < _PAGE:
            break
    deltas = folding.deltas
    return Broken(follower.cursor, deltas) if follower.cursor is not None and deltas else None
