"""Going on with an answer that broke off: what there is of it, and which provider can give the rest."""

from collections.abc import Sequence
from typing import cast

from deltafan._events import CONTENT
from deltafan._fold import Fold
from deltafan._follow import Follower, RawEntry
from deltafan_worker._publisher import Publisher
from deltafan_worker._route import Route
from deltafan_worker._writer import Broken

_PAGE = 1000


async def read_broken(publisher: Publisher, events_key: str) -> Broken | None:
    """What an earlier attempt has left in the stream; None when nothing can be gone on from.

    Read like any reader would, so what lies behind a hole is not taken. `begin` then refuses a position that is not the
    stream's last.
    """
    follower, folding = Follower(), Fold()
    while True:
        page = await publisher.ask("XRANGE", events_key, follower.range_start, "+", "COUNT", _PAGE)
        before = follower.cursor
        for event in follower.take(cast(list[RawEntry], page)):
            folding.add(event)
        if len(page) < _PAGE or follower.cursor == before:
            break
    deltas = folding.deltas
    return Broken(follower.cursor, deltas) if follower.cursor is not None and deltas else None


def route_onwards(routes: Sequence[Route], broken: Broken) -> Route | None:
    """The provider that can be given the beginning and asked for the rest.

    None of them takes the beginning of a tool call, of speech or of a thought: only of a text.
    """
    if any(delta.type != CONTENT for delta in broken.deltas):
        return None
    return next((route for route in routes if route.continuation not in (None, "background")), None)


def text_of(broken: Broken) -> str:
    """The text so far."""
    return b"".join(delta.data for delta in broken.deltas).decode()
