"""The processes of a scenario: servers, workers, the model server, and the means to hurt them."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import aiohttp
from redis.asyncio import Redis

from bills import INPUT_PRICE, OUTPUT_PRICE, Calls
from deltafan._errors import RedisUnavailable
from deltafan._workers import living_workers
from support.proxy import TcpProxy, tcp_proxy
from support.valkey import Valkey, valkey_server
from transcripts import Transcript

HERE = Path(__file__).parent
LEASE_S = 2.0
WORKERS = 3
GOING_S = 20.0
"""A worker that was told to stop is gone by then, even when it hands over to a server that is away."""
COMING_S = 20.0
"""A worker that was started shows itself by then, also on a machine with too much to do."""

CATALOGUE = f"""
[providers.plain]
base_url = "%(url)s/v1"
[providers.partial]
base_url = "%(url)s/v1"
continuation = "partial"
[models.sim]
provider = "plain"
price = {{ currency = "USD", input = {INPUT_PRICE}, output = {OUTPUT_PRICE} }}
[models.continued]
provider = "partial"
price = {{ currency = "USD", input = {INPUT_PRICE}, output = {OUTPUT_PRICE} }}
"""


class Worker:
    """A worker's process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    @classmethod
    async def start(cls, env: dict[str, str], broken: str | None) -> Self:
        """Start one. `CHAOS_LOGS=1` shows what it has to say."""
        command = [sys.executable, str(HERE / "worker.py"), *(["--break", broken] if broken else [])]
        log = None if os.environ.get("CHAOS_LOGS") else subprocess.DEVNULL
        return cls(await _start(command, {**os.environ, **env}, log))

    def signal(self, number: int) -> None:
        """Send a signal."""
        if self._process.returncode is None:
            self._process.send_signal(number)

    async def order(self, words: str, *, within_s: float = 2.0) -> bool:
        """Give an order (worker.py) and wait until it has struck; one that does not in time is taken back."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(f"{words}\n".encode())
            try:
                line = await asyncio.wait_for(self._process.stdout.readline(), within_s)
            except TimeoutError:
                self._process.stdin.write(b"never mind\n")
                line = await asyncio.wait_for(self._process.stdout.readline(), within_s)
        except (TimeoutError, ConnectionError):
            return False
        return line == b"struck\n"

    async def gone(self) -> bool:
        """Wait for its end; False when it does not come."""
        try:
            await asyncio.wait_for(self._process.wait(), GOING_S)
        except TimeoutError:
            return False
        return True

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self.exit_code is None

    @property
    def exit_code(self) -> int | None:
        """Of one that has ended; negative: the signal that ended it."""
        return self._process.returncode


@dataclass
class Fleet:
    """Everything that a fault can reach. All that talk to Redis go through the proxy."""

    valkey: Valkey
    spare: Valkey | None
    proxy: TcpProxy
    upstream: "ModelServer"
    env: dict[str, str]
    broken: str | None
    idle: list[Worker] = field(default_factory=list)
    """Workers that no fault has taken."""
    running: dict[str, int] = field(default_factory=dict)
    """By job whose answer a reader has begun to read: the process that writes it."""
    stopping: dict[str, Transcript] = field(default_factory=dict)
    """What those readers have that stop when `reads_on` is cleared."""
    reads_on: asyncio.Event = field(default_factory=asyncio.Event)
    owned: set[str] = field(default_factory=set)
    """What some fault has for itself."""
    failures: list[str] = field(default_factory=list)
    """Workers that ended unbidden, or did not when they were told to."""
    _started: list[Worker] = field(default_factory=list)

    @property
    def redis(self) -> Redis:
        """A client that goes around the proxy."""
        client: Redis = Redis.from_url(self.valkey.url)
        return client

    async def start_worker(self) -> Worker:
        """One more."""
        worker = await Worker.start(self.env, self.broken)
        self._started.append(worker)
        self.idle.append(worker)
        return worker

    async def is_up(self, worker: Worker) -> bool:
        """Wait until a worker that was started shows itself; False when it does not come to that, or is hurt first."""
        with suppress(TimeoutError):
            async with asyncio.timeout(COMING_S):
                while worker.is_alive:
                    if await self._shows(worker):
                        return True
                    await asyncio.sleep(0.1)
        return False

    async def _shows(self, worker: Worker) -> bool:
        with suppress(RedisUnavailable):
            names = [shown.name for shown in await living_workers(self.valkey.url)]
            return any(name.endswith(f":{worker.pid}") for name in names)
        return False

    async def take_worker(self, chance: random.Random) -> Worker | None:
        """A worker that runs a job, to be hurt by one fault alone, and then given back or replaced. One is left."""
        for _ in range(40):
            busy = [worker for worker in self.idle if self.is_busy(worker)]
            if busy and len(self.idle) > 1:
                self.idle.remove(worker := chance.choice(busy))
                return worker
            await asyncio.sleep(0.05)
        return None

    def is_busy(self, worker: Worker) -> bool:
        """Whether it runs a job, as far as readers know."""
        return worker.pid in self.running.values()

    async def end(self, worker: Worker, number: int) -> None:
        """Stop one that has been taken, by a signal."""
        worker.signal(number)
        if not await worker.gone():
            self.failures.append(f"worker {worker.pid} did not end within {GOING_S:g} s")
            worker.signal(signal.SIGKILL)

    def note_dead(self) -> None:
        """Note the workers that have ended unbidden."""
        dead = [worker for worker in self.idle if not worker.is_alive]
        self.failures += [f"worker {worker.pid} ended by itself (exit code {worker.exit_code})" for worker in dead]

    async def stop(self) -> None:
        """End all workers."""
        for worker in self._started:
            worker.signal(signal.SIGCONT)
            worker.signal(signal.SIGKILL)
        for worker in self._started:
            await worker.gone()


@asynccontextmanager
async def fleet(*, persistent: bool, replicated: bool, broken: str | None = None) -> AsyncIterator[Fleet]:
    """A server, a model server and some workers, started; gone at the end."""
    async with AsyncExitStack() as stack:
        durability = {"appendonly": "yes", "appendfsync": "always"} if persistent else {"appendonly": "no", "save": ""}
        valkey = stack.enter_context(valkey_server(**durability))
        spare = stack.enter_context(valkey_server(**durability)) if replicated else None
        if spare is not None:
            await follow(spare, valkey)
        proxy = await stack.enter_async_context(tcp_proxy(valkey.port))
        upstream = await stack.enter_async_context(ModelServer.running())
        folder = Path(stack.enter_context(TemporaryDirectory()))
        (folder / "models.toml").write_text(CATALOGUE % {"url": upstream.url})
        made = Fleet(valkey, spare, proxy, upstream, _env(proxy.url, folder, replicated=replicated), broken)
        made.reads_on.set()
        stack.push_async_callback(made.stop)
        for _ in range(WORKERS):
            await made.start_worker()
        yield made


def _env(url: str, folder: Path, *, replicated: bool) -> dict[str, str]:
    settings = {
        "REDIS_URL": url,
        "MODELS": folder / "models.toml",
        "LEASE_S": LEASE_S,
        "CONCURRENCY": 100,
        "MAX_ATTEMPTS": 100,
        "MAX_RETRIES": 20,
        "DRAIN_TIMEOUT_S": 0.3,
        # Above the time for which a worker is frozen: one that wakes must not take that for the model's silence.
        "FIRST_DELTA_TIMEOUT_S": 5,
        "SILENCE_TIMEOUT_S": 1,
        "TOTAL_TIMEOUT_S": 30,
        "SWEEP_INTERVAL_S": 2,
        "REPLICAS": int(replicated),
        "REPLICAS_TIMEOUT_MS": 200,
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


async def _start(command: list[str], env: dict[str, str], log: int | None) -> asyncio.subprocess.Process:
    """A process that takes orders and answers them; Ctrl-C is not for it."""
    return await asyncio.create_subprocess_exec(
        *command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True
    )


class ModelServer:
    """The model server's process (model_server.py)."""

    def __init__(self, url: str, orders: str, http: aiohttp.ClientSession) -> None:
        self.url = url
        self._orders = orders
        self._http = http

    @classmethod
    @asynccontextmanager
    async def running(cls) -> AsyncIterator[Self]:
        """One, for the block's time."""
        process = await _start([sys.executable, str(HERE / "model_server.py")], dict(os.environ), None)
        try:
            assert process.stdout is not None
            urls = json.loads(await process.stdout.readline())
            async with aiohttp.ClientSession() as http:
                yield cls(urls["models"], urls["orders"], http)
        finally:
            process.kill()
            await process.wait()

    async def order(self, path: str, order: Any) -> None:
        """Have it break calls."""
        async with self._http.post(f"{self._orders}/{path}", json=order) as answer:
            answer.raise_for_status()

    async def calls(self) -> Calls:
        """What it has counted."""
        counts = await self._counts()
        return Calls(counts["begun"], counts["whole"], counts["endless"])

    async def broken(self) -> int:
        """How many calls it has broken."""
        return (await self._counts())["broken"][0]

    async def _counts(self) -> dict[str, dict[int, int]]:
        async with self._http.get(f"{self._orders}/calls") as answer:
            counts: dict[str, dict[str, int]] = await answer.json()
        return {name: {int(number): count for number, count in of.items()} for name, of in counts.items()}
