"""What a batch may cost, before it is sent."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from deltafan.batch import Row
from deltafan_config import Catalogue, Price, UnknownModel

_MILLION = 1_000_000
_BYTES_PER_TOKEN = 4
"""Of English text, roughly."""
_ATTACHMENT = re.compile(rb'"data:[^"]*"')
_BOUNDS = ("max_completion_tokens", "max_output_tokens", "max_tokens")


class Estimate:
    """Adds up rows as they are read."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._prices: dict[str, Price | None] = {}
        self._routes: set[str] = set()
        self._is_surprised = False
        """Whether there are models that only the workers can know."""
        self._input: defaultdict[str, float] = defaultdict(float)
        self._output: defaultdict[str, float] = defaultdict(float)
        self._rows = self._unbounded = 0
        self.unpriced: Counter[str] = Counter()
        """Rows of each model whose cost can not be known."""

    def add(self, row: Row) -> None:
        """Count a row."""
        self._rows += 1
        if row.model not in self._prices:
            self._prices[row.model] = self._price(row.model)
        if (price := self._prices[row.model]) is None:
            self.unpriced[row.model] += 1
            return
        text_bytes = len(_ATTACHMENT.sub(b"", orjson.dumps(row.body)))
        self._input[price.currency] += math.ceil(text_bytes / _BYTES_PER_TOKEN) * price.input / _MILLION
        if (most := _most_output_tokens(row.body)) is None:
            self._unbounded += 1
        else:
            self._output[price.currency] += most * price.output / _MILLION

    def mean(self) -> dict[str, float]:
        """What a row may cost, by currency; the output of rows that do not bound it is not in this."""
        currencies = {*self._input, *self._output}
        return {currency: (self._input[currency] + self._output[currency]) / self._rows for currency in currencies}

    def uses(self, name: str) -> bool:
        """Whether rows may count for the limits of this provider, or `provider/model`."""
        return name in self._routes or self._is_surprised

    def to_json(self) -> dict[str, Any]:
        """It by currency, and the rows whose cost, or whose output's, is not in it."""
        return {
            "input": dict(self._input),
            "output_at_most": dict(self._output),
            "unbounded_rows": self._unbounded,
            "unpriced_rows": dict(self.unpriced),
        }

    def lines(self) -> list[str]:
        """It in words."""
        lines = []
        if self._input:
            lines.append(f"estimated cost of all rows: input about {money(self._input)}")
            if self._output:
                lines[0] += f", output at most {money(self._output)}"
            if self._unbounded:
                lines[0] += f"; {self._unbounded:,} rows set no max_tokens, so their output is not in this"
        for model, rows in self.unpriced.most_common(5):
            lines.append(f"model {model} ({rows:,} rows) has no price in the catalogue: its cost can not be told")
        return lines

    def _price(self, model: str) -> Price | None:
        try:
            routes = self._catalogue.resolve(model)
        except UnknownModel:  # the workers' catalogue may know it
            self._is_surprised = True
            return None
        for route in routes:
            self._routes |= {route.provider.name, f"{route.provider.name}/{route.model}"}
        return routes[0].price


def money(costs: Mapping[str, float]) -> str:
    """Amounts of several currencies, which nobody may add up."""
    return ", ".join(f"{amount:.4f} {currency}" for currency, amount in sorted(costs.items()))


def _most_output_tokens(body: Mapping[str, Any]) -> int | None:
    given: Iterable[Any] = (body.get(name) for name in _BOUNDS)
    return next((bound for bound in given if isinstance(bound, int) and bound > 0), None)
