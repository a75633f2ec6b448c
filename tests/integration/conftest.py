from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from deltafan.testing import ScriptedUpstream, scripted_upstream
from deltafan_worker._leased import LeasedWorker
from support.workers import running_worker, settings_env


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with scripted_upstream() as upstream:
        yield upstream


@pytest.fixture
def env(redis_url: str, upstream: ScriptedUpstream, tmp_path: Path) -> dict[str, str]:
    """The environment of a worker for the shared server and the scripted upstream."""
    return settings_env(redis_url, upstream.url, tmp_path)


@pytest.fixture
async def worker(env: dict[str, str]) -> AsyncIterator[LeasedWorker]:
    async with running_worker(env) as worker:
        yield worker
