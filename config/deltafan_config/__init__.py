"""deltafan_config: what an operator sets: the environment's variables and the model catalogue."""

from deltafan_config._catalogue import (
    Catalogue,
    CatalogueError,
    MissingKey,
    Model,
    Price,
    Provider,
    Route,
    TimeoutOverrides,
    UnknownModel,
    shipped,
)
from deltafan_config._settings import Settings, SettingsError, load_settings

__all__ = [
    "Catalogue",
    "CatalogueError",
    "MissingKey",
    "Model",
    "Price",
    "Provider",
    "Route",
    "Settings",
    "SettingsError",
    "TimeoutOverrides",
    "UnknownModel",
    "load_settings",
    "shipped",
]
