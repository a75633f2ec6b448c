"""Lua scripts: read from the packages' `.lua` files, known to the server by their digest."""

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable


@dataclass(frozen=True, slots=True)
class Script:
    """A script's text and the digest that EVALSHA takes."""

    name: str
    source: bytes
    sha: bytes


@cache
def load(name: str, package: str = "deltafan", *, using: tuple[str, ...] = ("common",)) -> Script:
    """Read `<package>/lua/<name>.lua`, preceded by the parts of that package or of deltafan that it builds on.

    `using=()` is for scripts of the queue's side, which know nothing of a job's stream.
    """
    source = b"\n".join(_part(part, package).read_bytes() for part in (*using, name))
    return Script(name, source, hashlib.sha1(source, usedforsecurity=False).hexdigest().encode())


def _part(name: str, package: str) -> Traversable:
    own = files(package) / "lua" / f"{name}.lua"
    return own if own.is_file() else files("deltafan") / "lua" / f"{name}.lua"
