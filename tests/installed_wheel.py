"""What an installed wheel must hold. Run by `make wheel` with a Python that sees only what pip installed.

Usage: python -I tests/installed_wheel.py dist/deltafan-….whl
"""

import sys
from importlib import import_module
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).parents[1]
SOURCES = (
    ROOT / "producer/deltafan",
    ROOT / "worker/deltafan_worker",
    ROOT / "config/deltafan_config",
    ROOT / "cli/deltafan_cli",
)


def expected_files() -> set[str]:
    """Every source file, plus the catalogue that an operator finds in `config/`."""
    files = {
        path.relative_to(source.parent).as_posix()
        for source in SOURCES
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    return files | {"deltafan_config/models.toml"}


def check_contents(wheel: Path) -> None:
    """The wheel holds our packages whole, and nothing else at the top level."""
    names = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected_files(), f"missing or surplus in {wheel.name}: {sorted(names ^ expected_files())}"


def check_import(name: str) -> None:
    """The package comes from the installation and has everything it promises."""
    package = import_module(name)
    assert package.__file__ is not None
    assert Path(package.__file__).is_relative_to(sys.prefix), f"{name} was imported from {package.__file__}"
    for public in getattr(package, "__all__", ()):
        getattr(package, public)


if __name__ == "__main__":
    check_contents(Path(sys.argv[1]))
    for source in SOURCES:
        check_import(source.name)
    # The entry points behind the extras: their dependencies are all there, and so are the files they read.
    for module in ("deltafan_cli._app", "deltafan_worker.main"):
        import_module(module)
    from deltafan_config import Catalogue

    Catalogue.load(None)
