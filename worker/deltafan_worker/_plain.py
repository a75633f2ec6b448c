"""Values as JSON can hold them: servers send halves of UTF-16 pairs, endless numbers, and nests without a bottom."""

from collections.abc import Iterator
from typing import Any

import orjson

_DEEPEST = 64
"""Levels that are kept of a nest. orjson reads a thousand and writes 254."""

_NAMES = ("type", "role", "name", "status", "id", "call_id", "tool_call_id")


def whole_characters(text: str) -> str:
    """The text with its UTF-16 pairs joined and halves of them replaced."""
    return text if text.isascii() else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def plain(value: Any, levels: int = _DEEPEST) -> Any:
    """The value, or the nearest one that can be written."""
    if isinstance(value, str):
        return whole_characters(value)
    if isinstance(value, dict):
        return {whole_characters(key): plain(inner, levels - 1) for key, inner in value.items()} if levels else None
    if isinstance(value, list):
        return [plain(inner, levels - 1) for inner in value] if levels else None
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return None
    return value


def texts_in(value: Any) -> Iterator[str]:
    """All texts in the messages of a prompt, but for the names of things."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            if name not in _NAMES:
                yield from texts_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts_in(inner)


def json_text(value: Any) -> str:
    """The JSON text that a string or an object stands for; "" for an empty one and for anything else."""
    if isinstance(value, str):
        return value
    return orjson.dumps(plain(value)).decode() if isinstance(value, dict) and value else ""
