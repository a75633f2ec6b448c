"""Lua scripts: read from the packages' `.lua` files, known to the server by their digest."""

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True, slots=True)
class Script:
    """A script's text and the digest that EVALSHA takes."""

    name: str
    source: bytes
    sha: bytes


@cache
def load(name: str, package: str = "deltafan", *, using: tuple[str, ...] = ("common",)) -> Script:
    """Read `<package>/lua/<name>.lua`, preceded by the parts of deltafan that it builds on.

    `using=()` is for scripts of the queue's side, which know nothing of a job's stream.
    """
    parts = [files("deltafan") / "lua" / f"{part}.lua" for part in using]
    parts.append(files(package) / "lua" / f"{name}.lua")
    source = b"\n".join(part.read_bytes() for part in parts)
    return Script(name, source, hashlib.sha1(source, usedforsecurity=False).hexdigest().encode())
