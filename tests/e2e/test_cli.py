"""The command line as its user meets it: processes, exit codes, words."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from deltafan.testing import ScriptedUpstream, scripted_upstream
from deltafan.testing import chat as script
from deltafan_cli import _app
from deltafan_config import Settings
from support.waiting import is_alive, wait_until
from support.workers import child_pids, kill_all, prepended, settings_env, supervisor_process, worker_process

DELTAFAN = [sys.executable, "-m", "deltafan_cli"]
NOWHERE = {"DELTAFAN_REDIS_URL": "redis://:secret@127.0.0.1:1/0"}


def run(*args: str, env: dict[str, str], stdin: str = "") -> "subprocess.CompletedProcess[str]":
    whole = {**os.environ, "COLUMNS": "120", **env}
    return subprocess.run(
        [*DELTAFAN, *args], env=whole, input=stdin, capture_output=True, text=True, timeout=30, check=False
    )


async def arun(*args: str, env: dict[str, str], stdin: str = "") -> "subprocess.CompletedProcess[str]":
    return await asyncio.to_thread(run, *args, env=env, stdin=stdin)


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with scripted_upstream() as upstream:
        yield upstream


@pytest.fixture
def env(redis_url: str, upstream: ScriptedUpstream, tmp_path: Path) -> dict[str, str]:
    return settings_env(redis_url, upstream.url, tmp_path)


@pytest.fixture
def worker(env: dict[str, str]) -> "Iterator[subprocess.Popen[bytes]]":
    with worker_process(env) as process:
        yield process


def test_version_and_help_need_nothing() -> None:
    assert run("--version", env={}).stdout.startswith("deltafan 0.")
    help_text = run("--help", env={}).stdout
    for command in ("dev", "worker", "submit", "tail", "result", "cancel", "usage", "models"):
        assert command in help_text


@pytest.mark.parametrize(
    "args",
    [("submit", "-m", "sim", "Hi"), ("tail", "x"), ("result", "x"), ("cancel", "x"), ("usage",), ("worker", "--check")],
    ids=lambda a: a[0],
)
def test_no_redis_is_said_at_once_with_what_to_do(args: tuple[str, ...]) -> None:
    started = time.monotonic()
    done = run(*args, env=NOWHERE)
    assert time.monotonic() - started < 4, "a second, and a process's start"
    assert done.returncode == 1
    assert "deltafan dev" in done.stderr
    assert "docker compose up" in done.stderr
    assert "secret" not in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_while_it_still_loads_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)")
    done = run("--version", env={"PYTHONPATH": prepended(tmp_path)})
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


async def test_a_full_queue_is_one_sentence(env: dict[str, str]) -> None:
    env = {**env, "DELTAFAN_MAX_QUEUED": "1"}
    assert (await arun("submit", "-m", "sim", "Hi", env=env)).returncode == 0
    done = await arun("submit", "-m", "sim", "--job-id", "j2", "Hi", env=env)
    assert done.returncode == 1
    sentence = "job j2: not submitted: 1 jobs wait in lane interactive and 1 may; submit it again later"
    assert " ".join(done.stderr.split()) == sentence


@pytest.mark.parametrize(
    ("args", "env", "words"),
    [
        (("submit", "Hi"), {}, "--model"),
        (("submit", "-m", "sim", "--body", "{", "Hi"), NOWHERE, "body: is not JSON"),
        (("submit", "-m", "sim", "--body", "[1]", "Hi"), NOWHERE, "body: is not a JSON object"),
        (("submit", "-m", "sim", "--lane", "fast", "Hi"), NOWHERE, "lane: input should be"),
        (("submit", "-m", "sim", "--api", "soap", "Hi"), NOWHERE, "api: input should be"),
        (("submit", "-m", "sim", "--job-id", "a/b", "Hi"), NOWHERE, "job_id: 'a/b' is not"),
        (("submit", "-m", "m" * 257, "Hi"), NOWHERE, "model: "),
        (("tail", "x", "--from", "xyz"), NOWHERE, "position: 'xyz' is not"),
        (("tail", "a/b"), NOWHERE, "job_id: 'a/b' is not"),
        (("result", "a/b"), NOWHERE, "job_id: 'a/b' is not"),
        (("cancel", "a/b"), NOWHERE, "job_id: 'a/b' is not"),
        (("frobnicate",), {}, "No such command"),
        (("models",), {"DELTAFAN_MODELS": "/nowhere.toml"}, "/nowhere.toml: can not be read"),
        (("worker", "--processes", "0"), {}, "processes"),
        (("usage",), {"DELTAFAN_REDIS_ULR": "x"}, "did you mean DELTAFAN_REDIS_URL"),
    ],
)
def test_wrong_use_ends_with_2_and_says_why(args: tuple[str, ...], env: dict[str, str], words: str) -> None:
    done = run(*args, env=env)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("args", [("models",), ("models", "--json"), ("--version",)], ids=" ".join)
def test_a_full_disk_is_one_sentence(args: tuple[str, ...]) -> None:
    env = {**os.environ, "PYTHONUNBUFFERED": ""}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*DELTAFAN, *args], env=env, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "the output can not be written (No space left on device)\n")


def test_what_a_terminals_encoding_does_not_have_is_written_as_its_code() -> None:
    done = run("models", env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "openai/\\u2026" in done.stdout


async def test_submit_follow_prints_the_answer_alone(
    env: dict[str, str], worker: "subprocess.Popen[bytes]", upstream: ScriptedUpstream
) -> None:
    done = await arun("submit", "-m", "sim", "-f", "--system", "Be brief", "-", env=env, stdin="Hi")
    assert (done.returncode, done.stdout, done.stderr) == (0, "Hello, world!\n", "")
    assert upstream.requests[0].body["messages"] == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Hi"},
    ]


async def test_one_job_through_all_commands(env: dict[str, str], worker: "subprocess.Popen[bytes]") -> None:
    job_id = (await arun("submit", "-m", "sim", "--deadline", "60", "Hi", env=env)).stdout.strip()
    assert (await arun("result", job_id, env=env)).stdout == "Hello, world!\n"
    result = json.loads((await arun("result", "--json", job_id, env=env)).stdout)
    assert (result["status"], result["content"]) == ("completed", "Hello, world!")
    lines = (await arun("tail", job_id, env=env)).stdout.splitlines()
    assert [line.split("\t")[1] for line in lines] == ["started", *["content"] * 4, "completed"]
    events = [json.loads(line) for line in (await arun("tail", "--json", job_id, env=env)).stdout.splitlines()]
    assert "".join(event.get("text", "") for event in events) == "Hello, world!"
    rest = (await arun("tail", "--json", "--from", events[3]["position"], job_id, env=env)).stdout.splitlines()
    assert [json.loads(line) for line in rest] == events[4:]
    assert "had ended already" in (await arun("cancel", job_id, env=env)).stdout
    (record,) = [json.loads(line) for line in (await arun("usage", "--json", env=env)).stdout.splitlines()]
    assert (record["job_id"], record["outcome"]) == (job_id, "completed")
    assert job_id in (await arun("usage", env=env)).stdout


async def test_a_failed_job_ends_with_1_and_the_reason(
    env: dict[str, str], worker: "subprocess.Popen[bytes]", upstream: ScriptedUpstream
) -> None:
    upstream.then(script.Refuse(400, b'{"error": {"message": "no such thing", "code": "bad"}}'))
    done = await arun("submit", "-m", "sim", "-f", "Hi", env=env)
    assert done.returncode == 1
    assert "no such thing" in done.stderr
    missing = await arun("result", "nobody", env=env)
    assert missing.returncode == 1
    assert "not found" in missing.stderr


async def test_ctrl_c_stops_reading_and_leaves_the_job_alone(
    env: dict[str, str], worker: "subprocess.Popen[bytes]", upstream: ScriptedUpstream, redis: Redis
) -> None:
    gate = asyncio.Event()
    upstream.then([script.delta(content="Once "), gate, script.delta(content="upon"), *script.ending()])
    command = [*DELTAFAN, "submit", "-m", "sim", "-f", "Hi"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env={**os.environ, **env}, text=True, **pipes) as process:  # type: ignore[call-overload]
        await wait_until(lambda: len(upstream.requests) == 1, "the model is called")
        assert await asyncio.to_thread(process.stdout.read, 5) == "Once "
        process.send_signal(signal.SIGINT)
        _, stderr = await asyncio.to_thread(process.communicate)
    assert process.returncode == 130
    assert "goes on" in stderr
    assert "Traceback" not in stderr
    gate.set()
    (state,) = await redis.keys("deltafan:{*}:state")
    job_id = state.decode().split("{")[1].split("}")[0]
    assert (await arun("result", job_id, env=env)).stdout == "Once upon\n"


@pytest.mark.parametrize(
    "args", [("submit", "-m", "sim", "-f", "--job-id", "j1", "Hi"), ("tail", "j1"), ("result", "j1")]
)
async def test_who_waits_is_told_that_no_worker_runs_and_that_ctrl_c_leaves_the_job(
    env: dict[str, str], args: tuple[str, ...]
) -> None:
    assert (await arun("submit", "-m", "sim", "--job-id", "j1", "Hi", env=env)).returncode == 0
    whole = {**os.environ, **env}
    with subprocess.Popen([*DELTAFAN, *args], env=whole, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = await asyncio.to_thread(process.stderr.readline)
        assert line.startswith("No worker has shown itself; the job waits for one: `")
        process.send_signal(signal.SIGINT)
        _, stderr = await asyncio.to_thread(process.communicate)
    assert process.returncode == 130
    assert "Stopped reading; job j1 goes on. `" in stderr
    assert "Traceback" not in stderr


async def test_who_waits_is_told_nothing_while_a_worker_lives(
    redis: Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_app, "_PATIENCE_S", 0)
    await _app._say_when_nobody_works(Settings(redis_url="redis://127.0.0.1:1"))
    await redis.zadd("deltafan:workers", {"elsewhere:1": time.time()})
    await redis.expire("deltafan:workers", 60)
    await redis.set("deltafan:worker:elsewhere:1", '{"running": 0, "slots": 1}', ex=60)
    await _app._say_when_nobody_works(Settings(redis_url=redis_url))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("what", ["REDIS_URL", "STREAMS_URL"])
async def test_a_worker_waits_for_redis_and_says_so(what: str, env: dict[str, str]) -> None:
    nowhere = {f"DELTAFAN_{what}": "redis://:secret@127.0.0.1:1/0"}
    command = [*DELTAFAN, "worker"]
    with subprocess.Popen(command, env={**os.environ, **env, **nowhere}, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = ""
        while "waiting for it" not in said:
            said += (line := await asyncio.to_thread(process.stderr.readline))
            assert line, said
        process.terminate()
        said += (await asyncio.to_thread(process.communicate))[1]
    assert process.returncode == 0
    for word in ("secret", "ready", "Traceback"):
        assert word not in said


async def test_a_worker_that_waits_for_a_server_that_is_silent_stops_at_once(env: dict[str, str]) -> None:
    connected = asyncio.Event()

    async def be_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.set()
        await reader.read(-1)
        writer.close()

    async with await asyncio.start_server(be_silent, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        with worker_process({**env, "DELTAFAN_REDIS_URL": f"redis://{host}:{port}"}) as process:
            await asyncio.wait_for(connected.wait(), 20)
            process.terminate()
            assert await asyncio.to_thread(process.wait, 4) == 0


async def test_check_tells_whether_a_worker_lives_without_a_look_at_every_key(
    env: dict[str, str], redis: Redis
) -> None:
    await redis.config_resetstat()
    assert (await arun("worker", "--check", env=env)).returncode == 1
    assert "cmdstat_scan" not in await redis.info("commandstats")
    with worker_process(env):

        async def is_alive() -> bool:
            return (await arun("worker", "--check", env=env)).returncode == 0

        await wait_until(is_alive, "the worker has shown itself")


async def test_several_processes_share_the_work_and_stop_together(
    env: dict[str, str], upstream: ScriptedUpstream
) -> None:
    with supervisor_process(env, processes=2) as process:
        done = await arun("submit", "-m", "sim", "-f", "Hi", env=env)
        assert done.stdout == "Hello, world!\n"
        process.terminate()
        assert await asyncio.to_thread(process.wait, 20) == 0


async def test_no_process_outlives_a_supervisor_that_was_killed(
    env: dict[str, str], upstream: ScriptedUpstream
) -> None:
    with supervisor_process(env, processes=2) as process:
        await arun("submit", "-m", "sim", "-f", "Hi", env=env)
        children = child_pids(process)
        process.kill()
        try:
            await wait_until(lambda: not any(map(is_alive, children)), "they have followed it")
        finally:
            kill_all(children)  # whoever lives on holds the pipe that is read to its end


async def test_a_stop_that_comes_while_the_processes_start_is_heeded(env: dict[str, str]) -> None:
    with supervisor_process(env, processes=2) as process:
        await wait_until(lambda: len(child_pids(process)) >= 3, "both are started, and none listens yet")
        process.terminate()
        assert await asyncio.to_thread(process.wait, 20) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


def test_models_lists_what_is_ready() -> None:
    text = run("models", env={"OPENAI_API_KEY": "k"}).stdout
    assert "smollm2" in text
    ready = {words[0]: " ".join(words[1:3]) for words in map(str.split, text.splitlines())}
    assert (ready["gpt-4o"], ready["qwen3-max"]) == ("yes openai", "set DASHSCOPE_API_KEY")
    rows = [json.loads(line) for line in run("models", "--json", env={}).stdout.splitlines()]
    assert {"model", "provider", "price", "ready"} <= rows[0].keys()


@pytest.mark.model
def test_the_demonstration_on_the_real_model() -> None:
    started = time.monotonic()
    done = run("dev", "--demo", "--once", env={})
    assert done.returncode == 0, done.stderr
    assert "The three transcripts are identical." in done.stdout
    assert "input_tokens" in done.stdout
    assert len({line.split("sha256 ")[1] for line in done.stdout.splitlines() if "sha256" in line}) == 1
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(("number", "example"), [(1, "quickstart"), (-1, "simulated_model")])
def test_the_readmes_examples_are_files_word_for_word(number: int, example: str) -> None:
    root = Path(__file__).parents[2]
    code = (root / f"examples/{example}.py").read_text()
    readme = (root / "README.md").read_text()
    shown = readme.split("```python\n")[number].split("```")[0]
    assert [line for line in shown.splitlines() if line.strip()] == [line for line in code.splitlines() if line.strip()]


def test_the_simulated_model_answers_as_the_readme_says() -> None:
    program = Path(__file__).parents[2] / "examples/simulated_model.py"
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["['Hello', '!']", "/v1/responses Hi"]
