"""The processes of a scenario: servers, workers, the model server, and the means to hurt them."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import aiohttp
from redis.asyncio import Redis

from support.proxy import TcpProxy, tcp_proxy
from support.valkey import Valkey, valkey_server

HERE = Path(__file__).parent
LEASE_S = 2.0
WORKERS = 3

CATALOGUE = """
[providers.sim]
base_url = "{url}/v1"
[models.sim]
provider = "sim"
price = {{ currency = "USD", input = 1.0, output = 2.0 }}
"""


@dataclass
class Fleet:
    """Everything that a fault can reach. All that talk to Redis go through the proxy."""

    valkey: Valkey
    spare: Valkey | None
    proxy: TcpProxy
    upstream: str
    http: aiohttp.ClientSession
    env: dict[str, str]
    chance: random.Random
    broken: str | None
    workers: list["subprocess.Popen[bytes]"] = field(default_factory=list)
    running_jobs: dict[str, None] = field(default_factory=dict)
    """Ids that have been submitted and not ended, for faults that need one."""

    @property
    def redis(self) -> Redis:
        """A client that goes around the proxy."""
        client: Redis = Redis.from_url(self.valkey.url)
        return client

    def start_worker(self) -> None:
        """One more."""
        command = [sys.executable, str(HERE / "worker.py"), *(["--break", self.broken] if self.broken else [])]
        log = subprocess.DEVNULL if not os.environ.get("CHAOS_LOGS") else None
        self.workers.append(
            subprocess.Popen(command, env={**os.environ, **self.env}, stderr=log, start_new_session=True)
        )

    def pick(self) -> "subprocess.Popen[bytes]":
        """A worker to be hurt."""
        return self.chance.choice(self.workers)

    def replace(self, worker: "subprocess.Popen[bytes]") -> None:
        """Forget one that ends, and start another in its place."""
        self.workers.remove(worker)
        self.start_worker()

    async def upstream_faults(self, *names: str) -> None:
        """Let the next model calls fail in these ways."""
        async with self.http.post(f"{self.upstream}/faults", json=list(names)):
            pass

    async def upstream_calls(self) -> dict[int, int]:
        """How often each answer was begun."""
        async with self.http.get(f"{self.upstream}/calls") as answer:
            return {int(number): count for number, count in (await answer.json()).items()}

    def stop(self) -> None:
        """End the workers."""
        for worker in self.workers:
            for number in (signal.SIGCONT, signal.SIGKILL):
                if worker.poll() is None:
                    worker.send_signal(number)
        for worker in self.workers:
            worker.wait()


@asynccontextmanager
async def fleet(seed: str, *, persistent: bool, replicated: bool, broken: str | None = None) -> AsyncIterator[Fleet]:
    """A server, a model server and some workers, started; gone at the end."""
    async with AsyncExitStack() as stack:
        durability = {"appendonly": "yes", "appendfsync": "always"} if persistent else {"appendonly": "no", "save": ""}
        valkey = stack.enter_context(valkey_server(**durability))
        spare = stack.enter_context(valkey_server(**durability)) if replicated else None
        if spare is not None:
            await follow(spare, valkey)
        proxy = await stack.enter_async_context(tcp_proxy(valkey.port))
        url = stack.enter_context(_Upstream())
        http = await stack.enter_async_context(aiohttp.ClientSession())
        folder = Path(stack.enter_context(TemporaryDirectory()))
        (folder / "models.toml").write_text(CATALOGUE.format(url=url))
        made = Fleet(valkey, spare, proxy, url, http, _env(proxy.url, folder, replicated), random.Random(seed), broken)
        stack.callback(made.stop)
        for _ in range(WORKERS):
            made.start_worker()
        yield made


def _env(url: str, folder: Path, replicated: bool) -> dict[str, str]:  # noqa: FBT001  one of the fleet's own
    settings = {
        "REDIS_URL": url,
        "MODELS": folder / "models.toml",
        "LEASE_S": LEASE_S,
        "CONCURRENCY": 100,
        "MAX_ATTEMPTS": 100,
        "MAX_RETRIES": 20,
        "DRAIN_TIMEOUT_S": 0.3,
        "FIRST_DELTA_TIMEOUT_S": 3,
        "SILENCE_TIMEOUT_S": 1,
        "TOTAL_TIMEOUT_S": 30,
        "REPLICAS": int(replicated),
        "REPLICAS_TIMEOUT_MS": 200,
        "LOG_LEVEL": "info",
    }
    return {f"DELTAFAN_{name}": str(value) for name, value in settings.items()}


async def follow(replica: Valkey, primary: Valkey) -> None:
    """Make one server the other's replica, and wait until it is in step."""
    async with Redis.from_url(replica.url) as client, Redis.from_url(primary.url) as source:
        await client.replicaof("127.0.0.1", str(primary.port))
        async with asyncio.timeout(20):
            while (await client.info("replication")).get("master_link_status") != "up":
                await asyncio.sleep(0.05)
            await source.wait(1, 5000)


class _Upstream:
    """The model server's process for a block's time."""

    def __enter__(self) -> str:
        command = [sys.executable, str(HERE / "model_server.py")]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        url: str = json.loads(self._process.stdout.readline())["url"]
        return url

    def __exit__(self, *_error: object) -> None:
        self._process.kill()
        self._process.communicate()
