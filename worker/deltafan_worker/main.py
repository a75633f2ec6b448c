"""The worker's entry point: settings in, running processes out."""

import asyncio
import gc
import logging
import os
import re
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress

import aiohttp
import orjson
import uvloop
from arq.worker import func
from redis.exceptions import RedisError

from deltafan._background import background
from deltafan._errors import RedisUnavailable
from deltafan._keys import FUNCTION, LANES, Keys
from deltafan._lua import load
from deltafan._resp import ConnectionLost, ServerError, is_passing, open_connection
from deltafan._url import masked_url
from deltafan._workers import SHOWN_S
from deltafan_config import Catalogue, Settings
from deltafan_worker._batch_cancels import BatchCancels
from deltafan_worker._calls import ModelCalls
from deltafan_worker._cancels import listen_for_cancels
from deltafan_worker._cooldown import Cooldowns
from deltafan_worker._lanes import Shares
from deltafan_worker._leased import BEAT_S, LeasedWorker, WorkerOptions
from deltafan_worker._limits import FleetLimits
from deltafan_worker._publisher import Publisher
from deltafan_worker._queue_pool import QueuePool, queue_pool, run_script
from deltafan_worker._router import Router
from deltafan_worker._run import JobRunner
from deltafan_worker._signals import on_stop_signals
from deltafan_worker._sweeper import Sweeper, SweeperOptions

log = logging.getLogger("deltafan.worker")

_SHOW = load("show", "deltafan_worker", using=())
_WAIT_S = 1.0
_POLICY = re.compile(r"maxmemory_policy:([\w-]+)")


def run_worker(settings: Settings, env: Mapping[str, str], *, burst: bool = False) -> None:
    """Run one worker process until SIGTERM or SIGINT has drained it, or, as a burst, until nothing is due."""
    # What is loaded by now stays; collecting it again and again costs some 3 % of the work on a busy stream.
    gc.freeze()
    gc.set_threshold(50_000, 50, 50)
    uvloop.run(serve(settings, env, burst=burst))


async def serve(settings: Settings, env: Mapping[str, str], *, burst: bool = False) -> None:
    """Run one worker in this event loop until a signal has drained it."""
    async with open_worker(settings, env, burst=burst) as worker:
        with on_stop_signals(worker.drain):
            async with background(_wait_for_servers(settings), "deltafan-waiting") as waiting:
                await worker.until_draining(waiting)
            if not worker.is_draining:
                log.info("worker %s: ready, %d at once", worker.name, settings.concurrency)
            await worker.main()
            log.info("worker %s: stopped", worker.name)


@asynccontextmanager
async def open_worker(
    settings: Settings, env: Mapping[str, str], *, burst: bool = False
) -> AsyncIterator[LeasedWorker]:
    """A worker with all that it needs; `await worker.main()` runs it, `worker.drain()` ends that."""
    keys = Keys(settings.prefix)
    options = _options(settings, keys, burst=burst)
    publisher = Publisher(
        settings.streams_url,
        keys,
        beat_s=min(BEAT_S, settings.lease_s / 3),
        replicas=settings.replicas,
        replicas_timeout_ms=settings.replicas_timeout_ms,
    )
    async with queue_pool(settings.redis_url) as pool, _http_session() as session:
        limits = FleetLimits(pool, keys, options.queues, reserve=settings.interactive_share)
        runner = JobRunner(
            publisher=publisher,
            limits=limits,
            batches=BatchCancels(pool, keys),
            quota_pause_s=settings.quota_pause_s,
            calls=ModelCalls(session, Cooldowns(keys, publisher.send), max_retries=settings.max_retries),
            resolve=Router(Catalogue.load(settings.models), settings, env),
            retention=settings.retention,
            worker=options.name,
            max_attempts=settings.max_attempts,
        )
        generate = func(runner.generate, name=FUNCTION)
        worker = LeasedWorker([generate], options, pool=pool, keys=keys, limits=limits, on_unrun=runner.end_unrun)
        async with asyncio.TaskGroup() as tasks:
            helpers = [
                tasks.create_task(publisher.keep_open(), name="deltafan-publisher"),
                tasks.create_task(listen_for_cancels(settings.streams_url, keys.cancels, publisher.on_cancel)),
                tasks.create_task(limits.keep_telling(), name="deltafan-limits"),
                tasks.create_task(_show_presence(pool, keys, worker)),
                tasks.create_task(Sweeper(_sweeping(settings, options, keys)).run(), name="deltafan-sweeper"),
            ]
            yield worker
            await limits.told()
            for helper in helpers:
                helper.cancel()


def _options(settings: Settings, keys: Keys, *, burst: bool) -> WorkerOptions:
    return WorkerOptions(
        name=f"{socket.gethostname()}:{os.getpid()}",
        queues=[keys.queue(lane) for lane in LANES if settings.lanes in ("all", lane)],
        is_urgent=settings.lanes != "batch",
        shares=Shares(
            interactive=settings.interactive_share, batch=settings.batch_share, patience_s=settings.batch_patience_s
        ),
        concurrency=settings.concurrency,
        lease_s=settings.lease_s,
        drain_timeout_s=settings.drain_timeout_s,
        burst=burst,
        ledger_max_records=settings.ledger_max_records,
        # A job may be billed for a call long before its end: a hand-over's.
        billed_ttl_ms=settings.retention.live_ms + settings.retention.state_ms,
    )


def _sweeping(settings: Settings, options: WorkerOptions, keys: Keys) -> SweeperOptions:
    return SweeperOptions(
        name=options.name,
        redis_url=settings.redis_url,
        streams_url=settings.streams_url,
        keys=keys,
        retention=settings.retention,
        interval_s=settings.sweep_interval_s,
        ledger_max_records=options.ledger_max_records,
        billed_ttl_ms=options.billed_ttl_ms,
    )


@asynccontextmanager
async def _http_session() -> AsyncIterator[aiohttp.ClientSession]:
    # As many connections as there are generations; cookies of a provider are nobody's business.
    connector = aiohttp.TCPConnector(limit=0, ttl_dns_cache=60)
    async with aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar()) as session:
        yield session


async def _wait_for_servers(settings: Settings) -> None:
    """Return when the servers of the queue and of the streams answer."""
    for url in dict.fromkeys((settings.redis_url, settings.streams_url)):
        name = masked_url(url)
        policy = _POLICY.search(await _memory_of(url, name))
        if policy is not None and policy[1] != "noeviction":
            log.warning(
                "Redis at %s may evict keys (maxmemory-policy %s): streams and bills can be lost; set noeviction",
                name,
                policy[1],
            )


async def _memory_of(url: str, name: str) -> str:
    """What a server says of its memory, as soon as it says anything."""
    waiting = False
    while True:
        try:
            connection = await open_connection(url, timeout_s=5.0, name="deltafan-worker")
            try:
                async with asyncio.timeout(5.0):
                    return str(await connection.call("INFO", "memory"))
            finally:
                connection.close()
        except (RedisUnavailable, ConnectionLost, ServerError, TimeoutError) as error:
            if isinstance(error, ServerError) and not is_passing(error):
                return ""  # it answers, though not us this
            if not waiting:
                log.warning("no Redis at %s (%s); waiting for it", name, error)
            waiting = True
            await asyncio.sleep(_WAIT_S)


async def _show_presence(pool: QueuePool, keys: Keys, worker: LeasedWorker) -> None:
    """Keep short-lived keys that say this worker is alive and how busy it is."""
    lifetime_ms = int(SHOWN_S * 1000)
    while True:
        with suppress(RedisError, OSError):
            busy = orjson.dumps({"running": len(worker.tasks), "slots": worker.max_jobs})
            names = (keys.worker(worker.name), keys.workers)
            await run_script(pool, _SHOW, names, (worker.name, busy, lifetime_ms))
        await asyncio.sleep(SHOWN_S / 3)
