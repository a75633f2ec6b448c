"""What all commands need: settings, connections, and one event loop for each command."""

import asyncio
import os
import shutil
import sys
from collections.abc import Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any, TypeVar

import typer

from deltafan import Consumer, Producer
from deltafan_config import Settings, load_settings

T = TypeVar("T")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]


def await_(work: Coroutine[Any, Any, T]) -> T:
    """Run a command's work to its end."""
    return asyncio.run(work)


def command_name() -> str:
    """What to type for `deltafan` in this shell: how it was called, where it is not on the PATH."""
    called = sys.argv[0]
    if shutil.which("deltafan") is not None:
        return "deltafan"
    return called if called.endswith("deltafan") else f"{sys.executable} -m deltafan_cli"


def read_settings() -> Settings:
    """The settings of this process's environment."""
    return load_settings(os.environ)


def producer_of(settings: Settings) -> AbstractAsyncContextManager[Producer]:
    """A producer as the settings want it."""
    return Producer.connect(
        settings.redis_url,
        streams_url=settings.streams_url,
        prefix=settings.prefix,
        retention=settings.retention,
        max_body_bytes=settings.max_body_bytes,
        max_queued=settings.max_queued,
        replicas=settings.replicas,
        replicas_timeout_ms=settings.replicas_timeout_ms,
    )


def consumer_of(settings: Settings) -> AbstractAsyncContextManager[Consumer]:
    """A consumer as the settings want it."""
    return Consumer.connect(settings.streams_url, prefix=settings.prefix)
