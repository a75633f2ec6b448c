"""The repository's shape: what a folder ships, how long a part may be, what no file may mention."""

import ast
import os
import re
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PACKAGES = ["producer/deltafan", "worker/deltafan_worker", "config/deltafan_config", "cli/deltafan_cli"]
LOCKS = sorted(path.name for path in (ROOT / "requirements").glob("*.txt"))

MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 40
MAX_TEST_FUNCTION_LINES = 60

# Neither matches its own text here, so this file is searched as well.
INDEX_HOST = re.compile(r"\b((py" + r"pi|python" + r"hosted)\.org|npmjs\.(com|org)|(docker|ghcr|quay)\.io)\b")
MACHINE_PATH = re.compile(r"(?<![\w.)}])/(work|root|home|Users)/")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def repository_files() -> Iterator[Path]:
    """What a commit would hold, told by .gitignore alone: an unpacked sdist has no git."""
    ignored = [".git", *(line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split())]

    def is_ours(name: str) -> bool:
        return not any(fnmatch(name, pattern) for pattern in ignored)

    for folder, subfolders, names in os.walk(ROOT):
        subfolders[:] = filter(is_ours, subfolders)
        yield from (Path(folder, name) for name in names if is_ours(name))


def python_files(*folders: str) -> Iterator[tuple[str, str]]:
    """Path in the repository and text of every Python file under these folders."""
    for path in repository_files():
        relative = path.relative_to(ROOT)
        if relative.parts[0] in folders and path.suffix == ".py":
            yield str(relative), path.read_text(encoding="utf-8")


def functions(source: str) -> Iterator[Function]:
    return (node for node in ast.walk(ast.parse(source)) if isinstance(node, Function))


def line_count(node: Function) -> int:
    """Lines from `def` to the end, without the docstring's."""
    assert node.end_lineno is not None
    docstring = ast.get_docstring(node, clean=False)
    return node.end_lineno - node.lineno + 1 - (len(docstring.split("\n")) if docstring is not None else 0)


def sleeps(source: str) -> list[int]:
    """Lines that call any `sleep` outside `wait_until`."""
    allowed = {line for node in functions(source) if node.name == "wait_until" for line in _sleeping_lines(node)}
    return sorted(_sleeping_lines(ast.parse(source)) - allowed)


def _sleeping_lines(tree: ast.AST) -> set[int]:
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return {call.lineno for call in calls if ast.unparse(call.func).split(".")[-1] == "sleep"}


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def pins(lock: str) -> dict[str, str]:
    """Name and version of every pin."""
    text = (ROOT / "requirements" / lock).read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)", text, flags=re.MULTILINE))


def test_the_wheel_is_made_of_exactly_the_packages() -> None:
    found = {str(path.parent.relative_to(ROOT)) for path in ROOT.glob("*/*/__init__.py")}
    assert found == set(PACKAGES)
    assert pyproject()["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == PACKAGES


def test_no_top_folder_is_importable() -> None:
    assert not list(ROOT.glob("*/__init__.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_is_typed_and_introduced(package: str) -> None:
    folder, name = package.split("/")
    assert (ROOT / package / "py.typed").is_file()
    assert f"Import name: `{name}`\n" in (ROOT / folder / "README.md").read_text(encoding="utf-8")


def test_modules_are_short() -> None:
    lengths = {path: len(source.splitlines()) for path, source in python_files("producer", "worker", "config", "cli")}
    assert {path: lines for path, lines in lengths.items() if lines > MAX_MODULE_LINES} == {}


@pytest.mark.parametrize(
    ("folders", "limit"),
    [
        (("producer", "worker", "config", "cli", "bench", "chaos", "examples"), MAX_FUNCTION_LINES),
        (("tests",), MAX_TEST_FUNCTION_LINES),
    ],
)
def test_functions_are_short(folders: tuple[str, ...], limit: int) -> None:
    long = {
        f"{path}:{node.lineno} {node.name}": line_count(node)
        for path, source in python_files(*folders)
        for node in functions(source)
        if line_count(node) > limit
    }
    assert long == {}


def test_a_docstring_does_not_make_a_function_long() -> None:
    [node] = functions('def f() -> int:\n    """One.\n\n    Two.\n    """\n    return 1\n')
    assert line_count(node) == 2


def test_tests_do_not_sleep() -> None:
    found = [f"{path}:{line}" for path, source in python_files("tests") for line in sleeps(source)]
    assert found == []


def test_only_wait_until_may_sleep() -> None:
    body = "    await asyncio.sleep(1)\n"
    source = f"async def wait_until():\n{body}async def test_it():\n{body}    time.sleep(1)\n"
    assert sleeps(source) == [4, 5]


def test_no_file_names_an_index_or_a_path_of_one_machine() -> None:
    found = []
    for path in repository_files():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            if INDEX_HOST.search(line) or MACHINE_PATH.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


@pytest.mark.parametrize(
    ("line", "is_found"),
    [
        ("https://files." + "python" + "hosted" + ".org/simple", True),
        ("see /" + "home" + "/somebody/x", True),
        ("open('/" + "work" + "/x')", True),
        ("producer/home/x", False),
        ("https://example.org/home/x", False),
        ("the worker/deltafan_worker folder", False),
    ],
)
def test_the_patterns_find_what_they_are_for(line: str, *, is_found: bool) -> None:
    assert bool(INDEX_HOST.search(line) or MACHINE_PATH.search(line)) is is_found


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_has_hashes_and_no_address(lock: str) -> None:
    text = (ROOT / "requirements" / lock).read_text(encoding="utf-8")
    blocks = re.split(r"^(?=\S)", text, flags=re.MULTILINE)[1:]
    assert blocks
    assert [block.splitlines()[0] for block in blocks if "==" not in block or "--hash=sha256:" not in block] == []
    assert "://" not in text


@pytest.mark.parametrize(
    ("lock", "extras"),
    [
        ("client.txt", []),
        ("worker.txt", ["worker", "cli"]),
        ("demo.txt", ["worker", "cli", "dev"]),
        ("tests.txt", ["worker", "cli", "dev", "testing"]),
    ],
)
def test_a_lock_satisfies_what_the_project_asks_for(lock: str, extras: list[str]) -> None:
    project = pyproject()["project"]
    wanted = chain(project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras))
    pinned = pins(lock)
    for requirement in map(Requirement, wanted):
        if requirement.name != project["name"]:
            assert requirement.specifier.contains(pinned[requirement.name]), f"{lock} is stale: run `make lock`"


def test_the_locks_agree_on_versions() -> None:
    everything = pins("tests.txt")
    for lock in ("demo.txt", "worker.txt"):
        assert pins(lock).items() <= everything.items()


def test_the_client_column_has_another_redis_py_and_no_extra() -> None:
    client = pins("client.txt")
    assert client["redis"].split(".")[0] != pins("worker.txt")["redis"].split(".")[0]
    assert not client.keys() & {"arq", "aiohttp", "openai", "typer", "uvloop"}


def test_every_oddity_of_the_wire_has_its_tests() -> None:
    rows = re.findall(r"^\| (\d+) \|.*\| (.+) \|$", (ROOT / "docs/oddities.md").read_text(), flags=re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 36))
    for number, tests in rows:
        named = re.findall(r"\[`(\w+)`\]\(\.\./([^)]+)\)", tests)
        assert named, f"row {number} has no test"
        for name, path in named:
            assert f"def {name}(" in (ROOT / path).read_text(), f"{name} is not in {path}"


@pytest.mark.parametrize("document", ["PROTOCOL.md", "ARCHITECTURE.md"])
def test_every_test_that_a_document_names_is_there(document: str) -> None:
    tests = list(python_files("tests"))
    known = {Path(path).stem for path, _ in tests} | {node.name for _, source in tests for node in functions(source)}
    named = re.findall(r"\b(test_\w+)(…?)", (ROOT / document).read_text(encoding="utf-8"))
    assert named
    for name, is_cut in named:
        assert name in known or (is_cut and any(full.startswith(name) for full in known)), name
