"""What a script is made of, whatever the API."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias


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


@dataclass(frozen=True)
class Named:
    """A JSON object under an SSE event name of its own; `status` shows where the API tells one inside a 200."""

    event: str
    data: Mapping[str, Any]
    status: int = 200


Frame: TypeAlias = Mapping[str, Any] | Named | Raw
"""Something to write: a JSON object, in the framing of the API that was called, or bytes as they are."""

Step: TypeAlias = Frame | Gap | Cut | asyncio.Event

Dialect: TypeAlias = Literal["openai", "dashscope"]
"""Two vendors stream the same API in two ways."""


async def pause(step: Gap | asyncio.Event) -> None:
    """Let this step's time pass."""
    if isinstance(step, Gap):
        await simulated_delay(step.seconds)
    else:
        await step.wait()


async def simulated_delay(seconds: float) -> None:
    """What a slow server or network does. Tests themselves wait for what they are waiting for."""
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    timer = loop.call_later(seconds, over.set)
    try:
        await over.wait()
    finally:
        timer.cancel()
