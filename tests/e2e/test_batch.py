"""`deltafan batch` as its users run it, and as its machines die."""

import asyncio
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from deltafan.testing import Answer, Gap, Refuse, ScriptedUpstream, Text, scripted_upstream
from support.waiting import wait_until
from support.workers import running_worker, settings_env, worker_process

ROWS = 200


@pytest.fixture
async def upstream() -> Any:
    async with scripted_upstream() as upstream:
        yield upstream


@pytest.fixture
def env(redis_url: str, upstream: ScriptedUpstream, tmp_path: Path) -> dict[str, str]:
    return settings_env(redis_url, upstream.url, tmp_path)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"id": f"r{n}", "prompt": f"row {n}"}) + "\n" for n in range(ROWS)))
    return path


def command(rows: Path, *more: str) -> list[str]:
    program = [sys.executable, "-m", "deltafan_cli", "batch", "run", "-m", "sim", "-i", str(rows)]
    return [*program, "-o", str(rows.with_name("out.jsonl")), *more]


async def run(rows: Path, env: dict[str, str], *more: str) -> subprocess.CompletedProcess[str]:
    def work() -> subprocess.CompletedProcess[str]:
        options: dict[str, Any] = {"env": {**os.environ, **env}, "capture_output": True, "text": True, "timeout": 60}
        return subprocess.run(command(rows, *more), check=False, **options)

    return await asyncio.to_thread(work)


def answers(rows: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in rows.with_name("out.jsonl").read_bytes().splitlines()]


def prompts(upstream: ScriptedUpstream) -> Counter[str]:
    return Counter(request.body["messages"][0]["content"] for request in upstream.requests)


async def test_every_row_is_answered_once_and_a_second_run_has_nothing_to_do(
    env: dict[str, str], upstream: ScriptedUpstream, rows: Path
) -> None:
    async with running_worker(env):
        first = await run(rows, env, "--json")
        again = await run(rows, env, "--ordered")
        shown = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "deltafan_cli", "batch", "list", "--json"],
            check=True,
            env={**os.environ, **env},
            capture_output=True,
            text=True,
        )
    assert (first.returncode, again.returncode) == (0, 0), first.stderr
    assert json.loads(first.stdout)["answered"] == ROWS
    assert Counter(line["custom_id"] for line in answers(rows)) == {f"r{n}": 1 for n in range(ROWS)}
    assert len(upstream.requests) == ROWS
    assert json.loads(shown.stdout)["status"] == "completed"


async def test_failed_rows_are_told_apart_and_tried_again_by_the_next_run(
    env: dict[str, str], upstream: ScriptedUpstream, rows: Path
) -> None:
    upstream.then(*[Refuse(400, b'{"error": {"message": "no", "code": "invalid_request_error"}}')] * 5)
    async with running_worker(env):
        first = await run(rows, env)
        errors = rows.with_name("out.jsonl.errors").read_bytes().splitlines()
        again = await run(rows, env)
    assert (first.returncode, len(errors), again.returncode) == (3, 5, 0)
    assert "invalid_request_error: 5" in first.stderr
    assert len(answers(rows)) == ROWS


async def test_the_order_of_the_rows_may_be_kept(env: dict[str, str], upstream: ScriptedUpstream, rows: Path) -> None:
    async with running_worker(env):
        assert (await run(rows, env, "--ordered", "--window", "20")).returncode == 0
    assert [line["custom_id"] for line in answers(rows)] == [f"r{n}" for n in range(ROWS)]


async def test_a_limit_of_cost_stops_cleanly(env: dict[str, str], upstream: ScriptedUpstream, rows: Path) -> None:
    async with running_worker(env):
        stopped = await run(rows, env, "--limit-cost", "0.0005", "--window", "20")
    assert stopped.returncode == 3
    assert "stopped at the limit" in stopped.stderr
    assert 20 <= len(answers(rows)) < ROWS


@pytest.mark.parametrize("victims", ["runner", "worker", "both"])
async def test_killed_half_way_and_run_again_every_row_is_there_once(
    env: dict[str, str], upstream: ScriptedUpstream, rows: Path, victims: str
) -> None:
    upstream.standing = Answer([Text("Hello"), Gap(0.02), Text("!")])
    env = {**env, "DELTAFAN_CONCURRENCY": "4", "DELTAFAN_LEASE_S": "2"}
    runner = await asyncio.create_subprocess_exec(
        *command(rows, "--window", "50"), env={**os.environ, **env}, stderr=subprocess.DEVNULL
    )
    out = rows.with_name("out.jsonl")
    with worker_process(env) as worker:
        await wait_until(lambda: out.exists() and out.read_bytes().count(b"\n") >= ROWS // 2, "half is answered")
        if victims != "worker":
            runner.kill()
        if victims != "runner":
            worker.kill()
        with worker_process(env):
            if victims != "worker":
                await runner.wait()
                assert (await run(rows, env)).returncode == 0
            else:
                assert await asyncio.wait_for(runner.wait(), 60) == 0
    assert Counter(line["custom_id"] for line in answers(rows)) == {f"r{n}": 1 for n in range(ROWS)}
    assert len(upstream.requests) <= 1.02 * ROWS, "no model is called again for an answer that is there"
    assert set(prompts(upstream)) == {f"row {n}" for n in range(ROWS)}


async def test_another_machine_cancels_it(env: dict[str, str], upstream: ScriptedUpstream, rows: Path) -> None:
    upstream.standing = Answer([Text("Hello"), asyncio.Event()])
    async with running_worker(env):
        running = asyncio.create_task(run(rows, env, "--id", "nightly", "--window", "50"))
        await wait_until(lambda: upstream.requests, "it runs")
        program = [sys.executable, "-m", "deltafan_cli", "batch", "cancel", "nightly"]
        await asyncio.to_thread(subprocess.run, program, check=True, env={**os.environ, **env}, capture_output=True)
        ended = await running
    assert ended.returncode == 3
    assert "batch cancelled" in ended.stderr
