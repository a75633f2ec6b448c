"""The catalogue as `deltafan models` shows it."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from deltafan_config import Catalogue, MissingKey, Provider


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


def models_table(rows: list[dict[str, Any]]) -> Table:
    """The rows for a person."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("model", "provider", "api", "input", "output", "per million", "ready"):
        table.add_column(name, justify="right" if name in ("input", "output") else "left", no_wrap=True)
    for row in rows:
        price = row["price"] or {}
        figures = [f"{price[kind]:g}" if kind in price else "–" for kind in ("input", "output")]
        table.add_row(
            row["model"], row["provider"], ", ".join(row["api"]), *figures, price.get("currency", "–"), row["ready"]
        )
    return table


def _provider(provider: Provider, env: Mapping[str, str]) -> dict[str, Any]:
    return {"provider": provider.name, "api": list(provider.apis), "ready": _ready(provider, env)}


def _ready(provider: Provider, env: Mapping[str, str]) -> str:
    try:
        return "no key needed" if provider.api_key(env) is None else f"{provider.api_key_env} is set"
    except MissingKey:
        return f"{provider.api_key_env} is not set"
