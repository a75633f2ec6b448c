"""Token counts: one shape for every API's usage object, an estimate where there is none, and what they cost.

Cached, cache-written and audio tokens are inside the input, reasoning and audio tokens inside the output. An explicit
0 is a count; None means that nobody said.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

_BYTES_PER_TOKEN = 4
_MILLION = 1_000_000

_INPUT = ("prompt_tokens", "input_tokens")
_OUTPUT = ("completion_tokens", "output_tokens")
_INPUT_DETAILS = ("prompt_tokens_details", "input_tokens_details")
_OUTPUT_DETAILS = ("completion_tokens_details", "output_tokens_details")


class Price(Protocol):
    """Per million tokens; None costs what the input or output costs that it is part of."""

    @property
    def currency(self) -> str: ...
    @property
    def input(self) -> float: ...
    @property
    def output(self) -> float: ...
    @property
    def cached_input(self) -> float | None: ...
    @property
    def cache_write(self) -> float | None: ...
    @property
    def reasoning(self) -> float | None: ...
    @property
    def input_audio(self) -> float | None: ...
    @property
    def output_audio(self) -> float | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCounts:
    """The counts of a usage record."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    total_tokens: int | None = None
    cached_input_tokens: int | None = None
    cache_write_tokens: int | None = None
    reasoning_tokens: int | None = None
    input_audio_tokens: int | None = None
    output_audio_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Cost:
    """An amount in a currency, or a note that says why there is none."""

    amount: float | None = None
    currency: str | None = None
    note: str | None = None


def normalise(raw: Mapping[str, Any]) -> TokenCounts:
    """Read a provider's usage object, whichever API it comes from: their names do not collide."""
    input_tokens, output_tokens = _count(raw, *_INPUT), _count(raw, *_OUTPUT)
    total = _count(raw, "total_tokens")
    if total is None and input_tokens is not None and output_tokens is not None:
        total = input_tokens + output_tokens
    # DashScope's Responses tells of cache writes and of speech only in a copy of the bill.
    inside_input = {**_billed(raw, _INPUT_DETAILS), **_details(raw, _INPUT_DETAILS)}
    inside_output = {**_billed(raw, _OUTPUT_DETAILS), **_details(raw, _OUTPUT_DETAILS)}
    cached = _count(inside_input, "cached_tokens")
    heard = _count(inside_input, "audio_tokens")
    reasoning = _count(inside_output, "reasoning_tokens")
    return TokenCounts(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        total_tokens=total,
        cached_input_tokens=cached if cached is not None else _count(raw, "prompt_cache_hit_tokens"),
        cache_write_tokens=_count(inside_input, "cache_creation_input_tokens", "cache_write_tokens"),
        reasoning_tokens=reasoning if reasoning is not None else _count(raw, "reasoning_tokens"),
        input_audio_tokens=heard if heard is not None else _count(raw, "audio_tokens"),
        output_audio_tokens=_count(inside_output, "audio_tokens"),
    )


def estimate(output_bytes: int) -> TokenCounts:
    """A guess from what was streamed: four bytes of UTF-8 a token, a rule of thumb that is right for English."""
    return TokenCounts(output_tokens=math.ceil(output_bytes / _BYTES_PER_TOKEN))


def cost(counts: TokenCounts, price: Price | None) -> Cost:
    """What the counts cost. Parts that exceed their whole, as some providers report, are cut to it."""
    if price is None:
        return Cost(note="the catalogue has no price for this model")
    if counts.input_tokens is None or counts.output_tokens is None:
        missing = "input" if counts.input_tokens is None else "output"
        return Cost(currency=price.currency, note=f"the {missing} tokens are not known")
    cached = min(counts.cached_input_tokens or 0, counts.input_tokens)
    written = min(counts.cache_write_tokens or 0, counts.input_tokens - cached)
    heard = min(counts.input_audio_tokens or 0, counts.input_tokens - cached - written)
    reasoning = min(counts.reasoning_tokens or 0, counts.output_tokens)
    spoken = min(counts.output_audio_tokens or 0, counts.output_tokens - reasoning)
    amount = (
        (counts.input_tokens - cached - written - heard) * price.input
        + cached * _or(price.cached_input, price.input)
        + written * _or(price.cache_write, price.input)
        + heard * _or(price.input_audio, price.input)
        + (counts.output_tokens - reasoning - spoken) * price.output
        + reasoning * _or(price.reasoning, price.output)
        + spoken * _or(price.output_audio, price.output)
    )
    return Cost(round(amount / _MILLION, 10), price.currency)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _details(raw: Mapping[str, Any], names: tuple[str, ...]) -> Mapping[str, Any]:
    """All details of one side; DashScope's native API spreads the input's over both names."""
    found: dict[str, Any] = {}
    for name in names:
        given = raw.get(name)
        found |= given if isinstance(given, dict) else {}
    return found


def _billed(raw: Mapping[str, Any], names: tuple[str, ...]) -> Mapping[str, Any]:
    copies = raw.get("x_details")
    first = copies[0] if isinstance(copies, list) and copies else None
    return _details(first, names) if isinstance(first, dict) else {}


def _count(data: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        value = data.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
    return None
