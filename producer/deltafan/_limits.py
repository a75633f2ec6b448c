"""The limits that a fleet keeps, as anybody may look at them."""

from collections.abc import Mapping
from dataclasses import dataclass

from deltafan._client import RedisClient
from deltafan._keys import LANES, Keys
from deltafan._resp import pack

_WINDOW_S = 61
"""Any minute lies within so many whole seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What is allowed and used of a provider, or of one of its models."""

    name: str
    """`provider`, or `provider/model`."""
    requests_per_minute: int | None
    tokens_per_minute: int | None
    concurrency: int | None
    requests: int
    """In the last minute."""
    tokens: int
    """In the last minute; what is running is counted as it was estimated."""
    running: int
    """Calls at this moment, where their number is limited."""
    waiting: Mapping[str, int]
    """Jobs of each lane that wait for room."""
    closed_s: float
    """For so long batch jobs leave it alone, because it has asked for less or for money; 0 when they do not."""
    reason: str | None
    """What it said when the account's money or quota was used up; batch jobs wait until that is mended."""


async def read_limits(client: RedisClient, keys: Keys) -> list[Limit]:
    """All that is known, by name. Only what has limits, or has asked for less within the last hour, is known."""
    names = sorted(raw.decode() for raw in await client.call("SMEMBERS", keys.limited))
    seconds, micros = await client.call("TIME")
    now_s = int(seconds) + int(micros) / 1e6
    commands = []
    for name in names:
        lots = [pack("ZCARD", keys.lot(keys.queue(lane), name)) for lane in LANES]
        commands += [pack("HGETALL", keys.limits + name), pack("SCARD", f"{keys.limits}{name}:running"), *lots]
    replies = await client.pipeline(commands) if commands else []
    step = 2 + len(LANES)
    return [
        _limit(name, replies[at], replies[at + 1], replies[at + 2 : at + step], now_s)
        for name, at in zip(names, range(0, len(replies), step), strict=True)
    ]


def _limit(name: str, flat: list[bytes], running: int, waiting: list[int], now_s: float) -> Limit:
    fields = {key.decode(): value.decode() for key, value in zip(flat[::2], flat[1::2], strict=True)}
    used = {"r": 0, "t": 0}
    for key, value in fields.items():
        if key[:1] in used and key[1:].isdigit() and int(key[1:]) > now_s - _WINDOW_S:
            used[key[:1]] += int(value)

    def number(key: str) -> int | None:
        return int(fields[key]) if key in fields else None

    return Limit(
        name=name,
        requests_per_minute=number("rpm"),
        tokens_per_minute=number("tpm"),
        concurrency=number("concurrency"),
        requests=used["r"],
        tokens=used["t"],
        running=running,
        waiting=dict(zip(LANES, waiting, strict=True)),
        closed_s=max(0.0, float(fields.get("closed", 0)) / 1000 - now_s),
        reason=fields.get("quota"),
    )
