"""Joining fragments of tool calls, over all the ways in which servers number and name them."""

from collections.abc import Mapping
from typing import Any

from deltafan_worker._plain import json_text


class ToolCallMerger:
    """Gives every call one dense index, and its id and its name once.

    A fragment belongs to the call at its `index`, unless it brings an id other than that call's: then it opens a call
    (servers that number every call 0). No id, or an empty one, continues. Without an index, the id decides; without
    either, it belongs to the latest call.
    """

    def __init__(self) -> None:
        self._by_index: dict[int, int] = {}
        self._by_id: dict[str, int] = {}
        self._ids: list[str] = []
        self._named: set[int] = set()
        self._snapshots: dict[int, str] = {}

    def take(
        self, fragment: Mapping[str, Any], *, is_snapshot: bool = False
    ) -> tuple[int, str | None, str | None, str] | None:
        """Index, id, name and arguments to publish (id and name only when they are news); None for nothing new.

        A snapshot has the arguments so far, not a piece of them.
        """
        function = fragment.get("function")
        function = function if isinstance(function, dict) else {}
        given = fragment.get("id")
        id_ = given if isinstance(given, str) else ""
        index, is_new = self._locate(fragment.get("index"), id_)
        news_id = id_ if id_ and not self._ids[index] else None
        if news_id:
            self._ids[index] = news_id
            self._by_id[news_id] = index
        name = function.get("name")
        news_name = name if isinstance(name, str) and name and index not in self._named else None
        if news_name:
            self._named.add(index)
        arguments = json_text(function.get("arguments"))
        if is_snapshot:
            arguments = self._news(index, arguments)
        if not (is_new or news_id or news_name or arguments):
            return None
        return index, news_id, news_name, arguments

    def _news(self, index: int, arguments: str) -> str:
        before = self._snapshots.get(index, "")
        if before.startswith(arguments):
            return ""
        if not arguments.startswith(before):  # a piece after all
            arguments = before + arguments
        self._snapshots[index] = arguments
        return arguments[len(before) :]

    def _locate(self, position: Any, id_: str) -> tuple[int, bool]:
        if isinstance(position, int):
            index = self._by_index.get(position)
            if index is not None and (not id_ or self._ids[index] in ("", id_)):
                return index, False
            if index is not None and id_ in self._by_id:
                return self._by_id[id_], False
            self._by_index[position] = self._open()
            return self._by_index[position], True
        if id_ and id_ in self._by_id:
            return self._by_id[id_], False
        if not id_ and self._ids:
            return len(self._ids) - 1, False
        return self._open(), True

    def _open(self) -> int:
        self._ids.append("")
        return len(self._ids) - 1
