"""Where a model call goes: everything the worker needs to know of a provider, resolved."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from deltafan_worker._usage import Price

_SHORTEST_SECRET = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Four limits in seconds, because one can not tell a dead peer from a model that thinks.

    Comments that keep a connection alive do not count as data: servers send them for minutes before giving up.
    """

    connect_s: float = 10.0
    first_delta_s: float = 300.0
    silence_s: float = 120.0
    """Between data frames, after the first delta."""
    total_s: float = 3600.0

    def over(self, given: Mapping[str, float]) -> "Timeouts":
        """These, but for those that are given."""
        return replace(self, **given) if given else self


Continuation: TypeAlias = Literal["partial", "prefix", "continue_final_message", "background"]
"""How a provider is asked to go on with an answer that broke off. The first three send what there is of it along;
`background` finds the same response again, which the provider went on generating."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the whole fleet together may ask of somebody; None: as much as it likes."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None

    def __bool__(self) -> bool:
        return self != Limits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One provider's way to one model."""

    provider: str
    api: str
    model: str
    """The name the provider knows."""
    url: str
    """The endpoint itself."""
    other_url: str | None = None
    """Where the model is if it is not there; only DashScope's native API has two places."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """With the key inside, hence not in the repr."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Goes under the request's body."""
    price: Price | None = None
    continuation: Continuation | None = None
    """None: it can not go on, only begin anew."""
    in_background: bool = False
    """Whether the provider is to generate on when nobody listens."""
    timeouts: Timeouts = Timeouts()
    provider_limits: Limits = Limits()
    """For all its models together."""
    limits: Limits = Limits()
    """For this model at this provider."""
    max_output_bytes: int = 16 * 1024 * 1024
    """What is longer is cut."""

    @property
    def secrets(self) -> list[str]:
        """What of the headers must not be shown, should a provider repeat it."""
        values = (value.removeprefix("Bearer ") for value in self.headers.values())
        return [value for value in values if len(value) >= _SHORTEST_SECRET]
