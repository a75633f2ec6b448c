"""The catalogue as `deltafan models` shows it."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from deltafan_cli._view import NOTHING
from deltafan_config import Catalogue, MissingKey, Provider

_WIDE = 100
"""Columns from which on there is room for the APIs."""


def model_rows(catalogue: Catalogue, env: Mapping[str, str]) -> list[dict[str, Any]]:
    """One row for each model, then one for each provider, through which unlisted models are reached."""
    rows: list[dict[str, Any]] = []
    for name in catalogue.models:
        for route in catalogue.resolve(name):
            price = route.price.model_dump(exclude_none=True) if route.price else None
            rows.append({"model": name, **_provider(route.provider, env), "price": price})
    for provider in catalogue.providers.values():
        rows.append({"model": f"{provider.name}/…", **_provider(provider, env), "price": None})
    return rows


def models_table(rows: list[dict[str, Any]], *, width: int) -> Table:
    """The rows for a person; what a narrow terminal has no room for is left out."""
    names = ["model", "ready", "provider", *(["api"] if width >= _WIDE else []), "in/out per 1M"]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in names:
        table.add_column(name, no_wrap=True)
    for row in rows:
        cells = {
            **row,
            "provider": "" if row["model"].endswith("/…") else row["provider"],  # it stands there already
            "api": ", ".join(row["api"]),
            "in/out per 1M": _price(row["price"]),
        }
        table.add_row(*(cells[name] for name in names))
    return table


def _price(price: Mapping[str, Any] | None) -> str:
    return NOTHING if price is None else f"{price['input']:g}/{price['output']:g} {price['currency']}"


def _provider(provider: Provider, env: Mapping[str, str]) -> dict[str, Any]:
    return {"provider": provider.name, "api": list(provider.apis), "ready": _ready(provider, env)}


def _ready(provider: Provider, env: Mapping[str, str]) -> str:
    try:
        provider.api_key(env)
    except MissingKey as error:
        return f"set {error.variable}"
    return "yes"
