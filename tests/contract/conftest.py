"""The event loops that contract tests run on."""

import asyncio
from collections.abc import Callable, Mapping
from importlib import import_module

import pytest


def pytest_asyncio_loop_factories(
    config: pytest.Config,
    item: pytest.Item,
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Of what depends on a loop's transports both: workers run on uvloop."""
    loops: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
    if item.path.name == "test_bodies.py":
        loops["uvloop"] = import_module("uvloop").new_event_loop
    return loops
