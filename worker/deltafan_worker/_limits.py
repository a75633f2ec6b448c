"""Limits of providers and their models, held by the whole fleet together; the scripts `limits.lua` and its users.

A job that must wait waits in Redis, in line with the others, and holds no slot: the claim that finds room for it takes
it. So no limit is exceeded by workers that do not know of each other, and none is left unused while jobs wait.
"""

import asyncio
import logging
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias
from uuid import uuid4

import orjson
from redis.exceptions import RedisError

from deltafan._keys import Keys
from deltafan._lua import Script, load
from deltafan_worker._queue_pool import QueuePool, run_script
from deltafan_worker._route import Limits, Route

log = logging.getLogger("deltafan.worker")

_ASK, _PARK, _SETTLE, _REFUSE = (
    load(name, "deltafan_worker", using=("limits",)) for name in ("ask", "park", "settle", "refuse")
)
_RETRY_PAUSE_S = 0.5
_LAST_WORDS_S = 2.0
_BYTES_PER_TOKEN = 4
_ATTACHMENT = re.compile(rb'"data:[^"]*"')

Refusal: TypeAlias = Literal["rate", "quota", "model_quota"]
"""What the provider has none left of: for this model now, for the account, for this model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """A call that was counted."""

    group: str
    second: int
    tokens: int
    number: str
    """Tells it from the group's other grants."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How large a call is expected to be."""

    input_tokens: int
    most_output_tokens: int | None

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> "Size":
        """A rough measure, to be corrected by what the provider counts; attachments are not text."""
        text_bytes = len(_ATTACHMENT.sub(b"", orjson.dumps(body)))
        parameters = body.get("parameters")
        fields = {**parameters, **body} if isinstance(parameters, Mapping) else body
        bounds = (fields.get(name) for name in ("max_completion_tokens", "max_output_tokens", "max_tokens"))
        most = next((bound for bound in bounds if isinstance(bound, int) and bound > 0), None)
        return cls(input_tokens=math.ceil(text_bytes / _BYTES_PER_TOKEN), most_output_tokens=most)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lot:
    """Where a job waits for room."""

    group: str
    size: Size


@dataclass(frozen=True, slots=True)
class Used:
    """What a call turned out to use; None for what nobody knows."""

    total_tokens: int | None
    output_tokens: int | None
    answered: bool
    made: bool = True
    """Whether there was a call at all."""


def group_of(route: Route) -> str:
    """The provider's model that a call counts for."""
    return f"{route.provider}/{route.model}"


class FleetLimits:
    """Asks for calls, and tells what became of them."""

    def __init__(self, pool: QueuePool, keys: Keys, queues: Sequence[str], *, reserve: float) -> None:
        self._pool = pool
        self._queues = tuple(queues)
        self._process, self._told = uuid4().hex[:12], 0
        self.common = (keys.limits, reserve)
        self._news: asyncio.Queue[tuple[Script, tuple[str, ...], tuple[Any, ...]]] = asyncio.Queue()

    async def ask(self, route: Route, size: Size, job_id: str, *, urgent: bool, line: str = "") -> Grant | Lot:
        """Count a call if there is room for it. With `line`, a queue, not before those of it that wait already.

        Waits an outage of the queue out.
        """
        most = "" if size.most_output_tokens is None else size.most_output_tokens
        numbers = [*_numbers(route.provider_limits), *_numbers(route.limits)]
        args = (*self.common, group_of(route), size.input_tokens, most, int(urgent), job_id, line, *numbers)
        allowed, second, tokens, number = await self._insist(_ASK, (), args)
        if allowed:
            return Grant(group=group_of(route), second=second, tokens=tokens, number=number.decode())
        return Lot(group=group_of(route), size=size)

    async def park(self, lot: Lot, queue: str, *, token: str, job_id: str, score: str, due_ms: int | None) -> bool:
        """Give a claim back until there is room. Returns whether it was still ours."""
        due = "" if due_ms is None else due_ms
        size = f"{lot.size.input_tokens} {lot.size.most_output_tokens or ''}"
        args = (*self.common, lot.group, size, token, job_id, score, due)
        return bool(await run_script(self._pool, _PARK, (queue,), args))

    def settle(self, grant: Grant, job_id: str, used: Used) -> None:
        """A counted call is over; its tokens are corrected and its place is free, in a moment."""
        counts = ["" if count is None else count for count in (used.total_tokens, used.output_tokens)]
        self._told += 1
        args = (
            *self.common,
            grant.group,
            job_id,
            grant.second,
            grant.tokens,
            *counts,
            int(used.answered),
            grant.number,
            int(used.made),
            self._process,
            self._told,
        )
        self._news.put_nowait((_SETTLE, self._queues, args))

    def refused(self, route: Route, kind: Refusal, *, pause_s: float, words: str) -> None:
        """The provider has asked for less, or for money: batch jobs of all workers leave it, or the model, alone."""
        args = (*self.common, group_of(route), kind, math.ceil(pause_s * 1000), words[:500])
        self._news.put_nowait((_REFUSE, (), args))

    async def keep_telling(self) -> None:
        """Send what `settle` and `refused` have to say; through an outage, for as long as it takes."""
        while True:
            await self._insist(*await self._news.get())
            self._news.task_done()

    async def _insist(self, script: Script, keys: Sequence[str], args: Sequence[Any]) -> Any:
        while True:
            try:
                return await run_script(self._pool, script, keys, args)
            except (RedisError, OSError) as error:
                log.debug("limits: %s is run later (%s)", script.name, error)
                await asyncio.sleep(_RETRY_PAUSE_S)

    async def told(self) -> None:
        """Wait for what is still to be said, though not through an outage: what a worker leaves unsaid is forgotten."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S):
                await self._news.join()


def _numbers(limits: Limits) -> tuple[int | str, ...]:
    given = (limits.requests_per_minute, limits.tokens_per_minute, limits.concurrency)
    return tuple("" if limit is None else limit for limit in given)
