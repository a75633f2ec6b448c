"""`deltafan batch` as its users run it, and as its machines die."""

import asyncio
import gzip
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from deltafan.testing import Answer, Gap, Refuse, ScriptedUpstream, Text, Tokens, scripted_upstream
from support.valkey import Valkey
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
        stopped = await run(rows, env, "--limit-cost", "0.0005")
    assert stopped.returncode == 3
    assert "stopped at the limit" in stopped.stderr
    costs = [line["cost"] for line in answers(rows)]
    assert 0.0005 - max(costs) <= sum(costs) <= 0.0005


async def test_one_dear_row_does_not_end_a_run_whose_other_rows_are_cheap(
    env: dict[str, str], upstream: ScriptedUpstream, rows: Path
) -> None:
    is_written = asyncio.Event()
    upstream.then(Answer([Text("dear")], usage=Tokens(input=9, output=3000)))
    upstream.standing = Answer([is_written, Text("cheap")])
    out = rows.with_name("out.jsonl")
    async with running_worker(env):
        running = asyncio.create_task(run(rows, env, "--json", "--limit-cost", "0.01"))
        await wait_until(lambda: out.exists() and out.read_bytes(), "the dear one is written")
        is_written.set()
        ended = await running
    assert ended.returncode == 0, ended.stderr
    assert 0.008 < json.loads(ended.stdout)["cost"]["USD"] < 0.01


async def test_what_waits_at_the_limit_costs_nothing_and_a_higher_one_goes_on_with_it(
    env: dict[str, str], upstream: ScriptedUpstream, rows: Path
) -> None:
    upstream.then(*[Answer([Text("cheap")])] * 10)
    upstream.standing = Answer([Gap(0.2), Text("dear")], usage=Tokens(input=9, output=500))
    async with running_worker({**env, "DELTAFAN_CONCURRENCY": "4"}):
        stopped = await run(rows, env, "--json", "--limit-cost", "0.003")
        begun, written = len(upstream.requests), len(answers(rows))
        upstream.standing = Answer([Text("cheap")])
        whole = await run(rows, env, "--json", "--limit-cost", "1")
    told = json.loads(stopped.stdout)
    assert (told["status"], told["answered"], told["failed"]) == ("stopped at the limit of its cost", begun, 0)
    assert written == begun <= 10 + 3 * 4, "some 30 rows were in flight, 4 of them running"
    assert (whole.returncode, len(upstream.requests)) == (0, ROWS)
    assert Counter(line["custom_id"] for line in answers(rows)) == {f"r{n}": 1 for n in range(ROWS)}
    assert not rows.with_name("out.jsonl.errors").exists()


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


def batch(env: dict[str, str], *args: str, given: bytes = b"") -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "deltafan_cli", "batch", *args]
    whole = {**os.environ, **env}
    ended = subprocess.run(program, check=False, env=whole, capture_output=True, input=given, timeout=60)
    return subprocess.CompletedProcess(program, ended.returncode, ended.stdout.decode(), ended.stderr.decode())


@pytest.mark.parametrize("source", ["-", "/dev/stdin"])
async def test_rows_come_from_a_pipe_packed_or_not(
    env: dict[str, str], upstream: ScriptedUpstream, rows: Path, source: str
) -> None:
    plain = await asyncio.to_thread(rows.read_bytes)
    for given in (plain, gzip.compress(plain)):
        arguments = ("run", "--check", "--json", "-m", "sim", "-i", source, "-o", str(rows.with_name("none")))
        looked = json.loads((await asyncio.to_thread(batch, env, *arguments, given=given)).stdout)
        assert (looked["rows"], looked["answered"], looked["estimate"]["unbounded_rows"]) == (ROWS, 0, ROWS)
        assert looked["estimate"]["input"]["USD"] > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_an_interrupted_run_says_how_to_go_on_and_leaves_nothing_behind(
    env: dict[str, str], upstream: ScriptedUpstream, rows: Path, tmp_path: Path, number: int
) -> None:
    upstream.standing = Answer([Text("Hello"), asyncio.Event()])
    (folder := tmp_path / "tmp").mkdir()
    whole = {**os.environ, **env, "TMPDIR": str(folder)}
    async with running_worker(env):
        runner = await asyncio.create_subprocess_exec(*command(rows), env=whole, stderr=subprocess.PIPE)
        await wait_until(lambda: upstream.requests, "it runs")
        runner.send_signal(number)
        _, told = await asyncio.wait_for(runner.communicate(), 10)
        shown = json.loads((await asyncio.to_thread(batch, env, "list", "--json")).stdout)
    assert (runner.returncode, shown["status"], list(folder.iterdir())) == (130, "interrupted", [])
    assert b"the same command goes on from here" in told
    assert f"deltafan batch cancel {shown['id']} ends" in told.decode()


async def test_the_first_ctrl_c_ends_the_reading_of_standard_input(env: dict[str, str], tmp_path: Path) -> None:
    program = [sys.executable, "-m", "deltafan_cli", "batch", "run", "-i", "-", "-o", str(tmp_path / "out")]
    whole = {**os.environ, **env, "TMPDIR": str(tmp_path)}

    def spooled() -> list[Path]:
        return list(tmp_path.glob("deltafan-batch-*"))

    runner = await asyncio.create_subprocess_exec(*program, env=whole, stdin=subprocess.PIPE)
    await wait_until(spooled, "it reads")
    runner.send_signal(signal.SIGINT)
    assert await asyncio.wait_for(runner.wait(), 10) == 130
    assert not spooled()


async def test_a_slow_reader_of_the_answers_does_not_hold_up_the_heartbeat(
    env: dict[str, str], upstream: ScriptedUpstream, rows: Path, redis: Redis
) -> None:
    upstream.standing = Answer([Text("x" * 4000)])
    program = [*command(rows)[:-1], "-", "--id", "b"]
    heard: set[bytes] = set()

    async def was_heard(times: int) -> bool:
        heard.add(await redis.execute_command("HGET", "deltafan:batch:b", "heard_s") or b"")
        return len(heard) > times

    async with running_worker(env):
        runner = await asyncio.create_subprocess_exec(*program, env={**os.environ, **env}, stdout=subprocess.PIPE)
        await wait_until(lambda: len(upstream.requests) == ROWS, "all are answered, and nobody reads")
        heard.clear()
        await wait_until(lambda: was_heard(3), "it is heard of again and again")
        whole, _ = await asyncio.wait_for(runner.communicate(), 30)
    assert (runner.returncode, whole.count(b"\n")) == (0, ROWS)


async def test_a_full_disk_ends_in_a_sentence(env: dict[str, str], upstream: ScriptedUpstream, rows: Path) -> None:
    arguments = ("run", "-m", "sim", "-i", str(rows), "-o", "/dev/full", "--errors", str(rows.with_name("errors")))
    async with running_worker(env):
        ended = await asyncio.to_thread(batch, env, *arguments)
        shown = json.loads((await asyncio.to_thread(batch, env, "list", "--json")).stdout)
    assert (ended.returncode, "Traceback" in ended.stderr, shown["status"]) == (1, False, "interrupted")
    assert "/dev/full: No space left on device" in ended.stderr
    assert "the same command goes on from here" in ended.stderr


async def test_only_one_run_at_a_time_writes_an_output(
    env: dict[str, str], upstream: ScriptedUpstream, rows: Path
) -> None:
    gate = asyncio.Event()
    upstream.standing = Answer([gate, Text("Hello")])
    async with running_worker(env):
        first = asyncio.create_task(run(rows, env))
        await wait_until(lambda: upstream.requests, "the first runs")
        second = await run(rows, env)
        looked = await run(rows, env, "--check")
        gate.set()
        assert (await first).returncode == 0
    assert (second.returncode, looked.returncode) == (2, 0)
    assert "another run writes" in second.stderr
    assert Counter(line["custom_id"] for line in answers(rows)) == {f"r{n}": 1 for n in range(ROWS)}


async def test_answers_go_to_standard_output_as_they_come_and_failures_to_standard_error(
    env: dict[str, str], upstream: ScriptedUpstream, rows: Path
) -> None:
    upstream.then(*[Refuse(400, b'{"error": {"message": "no", "code": "invalid_request_error"}}')] * 5)
    async with running_worker(env):
        arguments = ("run", "-m", "sim", "-i", str(rows), "-o", "-")
        first = await asyncio.to_thread(batch, env, *arguments)
        again = await asyncio.to_thread(batch, env, *arguments)
    assert (first.returncode, len(first.stdout.splitlines()), first.stderr.count('"message":"no"')) == (3, ROWS - 5, 5)
    assert (again.returncode, len(again.stdout.splitlines())) == (0, ROWS)
    assert len(upstream.requests) == ROWS + 5, "answers are taken, failures are tried again"


async def test_cost_is_that_of_all_runs(env: dict[str, str], upstream: ScriptedUpstream, rows: Path) -> None:
    async with running_worker(env):
        limit = ("--json", "--limit-cost", "0.0005", "--window", "20")
        first = json.loads((await run(rows, env, *limit)).stdout)
        again = json.loads((await run(rows, env, *limit)).stdout)
        whole = json.loads((await run(rows, env, "--json")).stdout)
        idle = json.loads((await run(rows, env, "--json")).stdout)
        shown = json.loads((await asyncio.to_thread(batch, env, "list", "--json")).stdout)
    assert first["cost"]["USD"] >= 0.0004
    assert again["answered"] - first["answered"] <= 20, "a limit that is reached lets no more than a window go"
    assert whole["cost"]["USD"] > first["cost"]["USD"]
    assert idle["cost"] == whole["cost"] == shown["cost"]


async def test_a_limit_that_can_not_hold_is_refused_and_costs_are_estimated(
    env: dict[str, str], upstream: ScriptedUpstream, rows: Path
) -> None:
    out = rows.with_name("other.jsonl")
    refused = await asyncio.to_thread(
        batch, env, "run", "-m", "one", "-i", str(rows), "-o", str(out), "--limit-cost", "1"
    )
    told = await asyncio.to_thread(batch, env, "run", "--check", "-m", "one", "-i", str(rows), "-o", str(out))
    priced = await run(rows, env, "--check")
    assert refused.returncode == 2
    assert "limit_cost: model one has no price" in refused.stderr
    assert "model one (200 rows) has no price" in told.stdout
    assert "estimated cost of all rows: input about 0.0" in priced.stdout
    assert not out.exists()


async def test_redis_may_go_away_for_a_while(
    fresh_valkey: Valkey, upstream: ScriptedUpstream, tmp_path: Path, rows: Path
) -> None:
    upstream.standing = Answer([Text("Hello"), Gap(0.05), Text("!")])
    env = settings_env(fresh_valkey.url, upstream.url, tmp_path, concurrency=4)
    out, told = rows.with_name("out.jsonl"), tmp_path / "told"
    with worker_process(env), told.open("wb") as stderr:
        runner = await asyncio.create_subprocess_exec(*command(rows), env={**os.environ, **env}, stderr=stderr)
        await wait_until(lambda: out.exists() and out.read_bytes().count(b"\n") >= 10, "some are answered")
        fresh_valkey.kill()
        await wait_until(lambda: b"Redis can not be reached" in told.read_bytes(), "the runner says so", timeout_s=40)
        fresh_valkey.start()
        assert await asyncio.wait_for(runner.wait(), 60) == 0, told.read_text()
    assert Counter(line["custom_id"] for line in answers(rows)) == {f"r{n}": 1 for n in range(ROWS)}


async def test_wrong_input_ends_in_a_sentence(env: dict[str, str], tmp_path: Path, rows: Path) -> None:
    cases = {
        ("-i", str(rows), "-o", str(rows)): "output: ",
        ("-i", str(rows), "-o", str(tmp_path / "no" / "out")): "output: ",
        ("-i", str(tmp_path / "none"), "-o", "-"): "input: there is no file",
        ("-i", str(tmp_path), "-o", "-"): "input: there is no file",
        ("-i", "-", "-o", "-"): "standard input, line 1: there is no row",
        ("-i", str(rows), "-o", str(tmp_path / "out.gz")): "name it without .gz",
        ("-i", str(rows), "-o", "."): "output: ",
        ("-i", str(rows), "-o", str(tmp_path / "out"), "--id", "2026/nightly"): "batch_id: ",
        ("-i", str(rows), "-o", str(tmp_path / "out"), "--tenant", "x" * 300): "tenant: ",
    }
    for arguments, message in cases.items():
        ended = await asyncio.to_thread(batch, env, "run", "-m", "sim", *arguments)
        assert (ended.returncode, "Traceback" in ended.stderr) == (2, False), ended.stderr
        assert message in ended.stderr
    nobody = await asyncio.to_thread(batch, env, "cancel", "nightly")
    assert (nobody.returncode, nobody.stderr) == (
        1,
        "nothing is known of batch nightly: it never ran here, or it is too long ago\n",
    )
    down = env | {"DELTAFAN_REDIS_URL": "redis://127.0.0.1:1"}
    broken = await asyncio.to_thread(batch, down, "run", "-i", "-", "-o", "-", given=b"{\n")
    assert (broken.returncode, "standard input, line 1: is not JSON" in broken.stderr) == (2, True)
