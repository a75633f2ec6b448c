"""`deltafan dev` with a simulated model: what it starts, what it says, and that nothing of it outlives it."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from deltafan import Producer
from deltafan.testing import ScriptedUpstream, scripted_upstream
from deltafan.testing import chat as script
from support.waiting import is_alive, wait_until
from support.workers import child_pids, prepended, settings_env

DEV = [sys.executable, "-m", "deltafan_cli", "dev", "--model", "sim"]


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with scripted_upstream() as upstream:
        yield upstream


@pytest.fixture
def env(upstream: ScriptedUpstream, tmp_path: Path) -> dict[str, str]:
    return settings_env("not used", upstream.url, tmp_path)


@contextmanager
def dev(env: dict[str, str], *options: str) -> Iterator["subprocess.Popen[str]"]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([*DEV, *options], env={**os.environ, **env}, text=True, **pipes)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


async def said(process: "subprocess.Popen[str]", words: str) -> str:
    """What it has printed, up to a line with these words."""
    assert process.stdout is not None
    lines = ""
    while words not in lines:
        line = await asyncio.to_thread(process.stdout.readline)
        assert line, lines
        lines += line
    return lines


async def running_job(process: "subprocess.Popen[str]", upstream: ScriptedUpstream) -> list[int]:
    """Have its worker call the model, which does not answer; the processes that it has started."""
    upstream.then([script.delta(content="Once "), asyncio.Event()])
    (url,) = re.findall(r"Valkey +(\S+)", await said(process, "Ctrl-C stops everything"))
    async with Producer.connect(url) as producer:
        await producer.submit(model="sim", messages=[{"role": "user", "content": "Hi"}])
    await wait_until(lambda: upstream.requests, "the model is called")
    return child_pids(process)


def worker_of(process: "subprocess.Popen[str]") -> int:
    (worker,) = [pid for pid in child_pids(process) if b"_dev_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return worker


async def end(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Its exit code and last words, within far less than it takes to kill a child that does not end by itself."""
    _, stderr = await asyncio.to_thread(process.communicate, timeout=7)
    return process.returncode, stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
async def test_nothing_is_left_whatever_ends_it(
    env: dict[str, str], upstream: ScriptedUpstream, number: signal.Signals
) -> None:
    with dev(env) as process:
        children = await running_job(process, upstream)
        assert len(children) == 2
        process.send_signal(number)
        try:
            code, stderr = await end(process)
            assert (code, stderr) == (-number if number == signal.SIGKILL else 0, "")
            await wait_until(lambda: not any(map(is_alive, children)), "worker and Valkey have followed it")
        finally:
            for pid in filter(is_alive, children):
                os.kill(pid, signal.SIGKILL)  # a worker that is left would take the jobs of the next test


async def test_a_worker_without_parent_and_server_is_not_left_waiting(
    env: dict[str, str], upstream: ScriptedUpstream
) -> None:
    with dev(env) as process:
        children = await running_job(process, upstream)
        worker = worker_of(process)
        (server,) = [pid for child in set(children) - {worker} for pid in child_pids(child)]
        os.kill(server, signal.SIGKILL)
        process.kill()
        await end(process)
    await wait_until(lambda: not is_alive(worker), "it has ended")


async def test_ctrl_c_again_and_again_stops_no_less(env: dict[str, str], upstream: ScriptedUpstream) -> None:
    with dev(env) as process:
        children = await running_job(process, upstream)
        while process.poll() is None:
            process.send_signal(signal.SIGINT)
            await asyncio.to_thread(_has_ended, process)
        assert await end(process) == (0, "")
        assert not any(map(is_alive, children)), "it has waited for all of them"


def _has_ended(process: "subprocess.Popen[str]") -> None:
    with suppress(subprocess.TimeoutExpired):
        process.wait(0.02)


@pytest.mark.parametrize("options", [(), ("--demo",)], ids=["serving", "demonstrating"])
async def test_a_worker_that_ends_ends_it_with_1(
    env: dict[str, str], upstream: ScriptedUpstream, options: tuple[str, ...]
) -> None:
    upstream.then([script.delta(content="Once "), asyncio.Event()])
    with dev(env, *options) as process:
        await said(process, "submitted" if options else "Ctrl-C stops everything")
        os.kill(worker_of(process), signal.SIGKILL)
        code, stderr = await end(process)
    assert code == 1
    assert "the worker has ended (exit code -9)" in stderr


async def test_a_worker_that_does_not_start_ends_it_with_1(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "arq.py").write_text("raise SystemExit('the reason')")
    with dev({**env, "PYTHONPATH": prepended(tmp_path)}) as process:
        await said(process, "Valkey")
        code, stderr = await end(process)
    assert code == 1
    assert "the reason\nthe worker has ended (exit code 1)" in stderr


async def test_the_demonstration_ends_with_one_bill(env: dict[str, str]) -> None:
    with dev(env, "--demo", "--once") as process:
        await said(process, "The three transcripts are identical.")
        assert await end(process) == (0, "")


@pytest.mark.parametrize(
    ("given", "options", "words"),
    [
        ({"DELTAFAN_DRAIN_TIMEOT_S": "3"}, (), "did you mean DELTAFAN_DRAIN_TIMEOUT_S?"),
        ({"DELTAFAN_MODELS": "/nowhere.toml"}, (), "/nowhere.toml: can not be read"),
        ({}, ("--once",), "--demo"),
    ],
    ids=["settings", "catalogue", "options"],
)
async def test_what_is_wrong_is_said_before_anything_starts(
    env: dict[str, str], given: dict[str, str], options: tuple[str, ...], words: str
) -> None:
    with dev({**env, **given}, *options) as process:
        stdout, stderr = await asyncio.to_thread(process.communicate)
    assert (process.returncode, stdout) == (2, "")
    assert words in stderr
