"""What a script is made of, whatever the API."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias


@dataclass(frozen=True)
class Refuse:
    """Answer with an HTTP error instead of a stream."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Raw:
    """Bytes as they are, in one write."""

    data: bytes


@dataclass(frozen=True)
class Gap:
    """Time that the model takes. For load; a test that wants an order uses an `asyncio.Event`."""

    seconds: float


class Cut:
    """Break the connection here."""


Frame: TypeAlias = Mapping[str, Any] | Raw
"""Something to write: a JSON object, in the framing of the API that was called, or bytes as they are."""

Step: TypeAlias = Frame | Gap | Cut | asyncio.Event


async def simulated_delay(seconds: float) -> None:
    """What a slow server or network does. Tests themselves wait for what they are waiting for."""
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    timer = loop.call_later(seconds, over.set)
    try:
        await over.wait()
    finally:
        timer.cancel()
