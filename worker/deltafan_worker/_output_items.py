"""The output items of a response: what was said of each, and the tool calls that are spread over their events."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from deltafan_worker._plain import json_text, plain

_WRAPPERS = ("parallel", "multi_tool_use.parallel")
"""A tool that nobody declared: some models wrap several calls in it."""


class Spoken:
    """Which kinds of text each output item has given already."""

    def __init__(self) -> None:
        self._places: set[tuple[str, str, Any]] = set()
        self._ids: dict[int | str, int | str] = {}
        self.kinds: set[str] = set()
        """All that was said anywhere."""

    def open(self, where: Mapping[str, Any]) -> None:
        """An item begins: its id, which its deltas may leave out."""
        index, item_id = _key(where.get("output_index")), _key(where.get("item_id"))
        if index is not None and item_id is not None:
            self._ids[index] = item_id

    def note(self, kind: str, where: Mapping[str, Any]) -> None:
        """Something was said there."""
        self.kinds.add(kind)
        self._places.update(self._names(kind, where))

    def has(self, kind: str, where: Mapping[str, Any]) -> bool:
        """Whether something was, there or at what goes by one of its names."""
        return any(name in self._places for name in self._names(kind, where))

    def _names(self, kind: str, where: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
        index, item_id = _key(where.get("output_index")), _key(where.get("item_id"))
        if item_id is None and index is not None:
            item_id = self._ids.get(index)
        names = (("output_index", index), ("item_id", item_id))
        return [(kind, name, key) for name, key in names if key is not None]


class EmitToolCall(Protocol):
    """Publishes a fragment of a call."""

    def __call__(
        self,
        index: int,
        *,
        call_id: str | None = None,
        name: str | None = None,
        arguments: str = "",
        extra: Mapping[str, Any] | None = None,
    ) -> None: ...


@dataclass(slots=True)
class _Call:
    id: str
    name: str
    index: int | None = None
    """Its number among the published ones; None while it is held back."""
    arguments: str = ""
    """As long as it is held back, or came with its opening."""
    has_arguments: bool = False
    is_done: bool = False


class OutputCalls:
    """Tool calls, from items, argument deltas and finished arguments in whatever mixture a server sends."""

    def __init__(self, emit: EmitToolCall) -> None:
        self._emit = emit
        self._calls: list[_Call] = []
        self._by_name: dict[tuple[str, Any], _Call] = {}
        self._published = 0
        self._reasoning: list[Mapping[str, Any]] = []

    def __bool__(self) -> bool:
        return bool(self._calls)

    def take_item(self, item: Mapping[str, Any], place: Mapping[str, Any], *, is_done: bool) -> None:
        """An item that is a call: added, done, or found in the final object."""
        call_id, where = _word(item.get("call_id")) or _word(item.get("id")), {**place, "item_id": item.get("id")}
        call = self._by_name.get(("call_id", call_id)) if call_id else self._find(where)
        arguments = item.get("arguments", item.get("input"))
        if call is None:
            call = self._open(call_id, _word(item.get("name")), json_text(arguments), where)
        else:
            self._remember(call, where)
        if is_done:
            self._complete(call, arguments)

    def take_reasoning(self, item: Mapping[str, Any]) -> None:
        """Reasoning that only the provider can read, and must have back with the call that it led to."""
        if item.get("encrypted_content"):
            self._reasoning.append(item)

    def add(self, where: Mapping[str, Any], fragment: Any) -> None:
        """A piece of a call's arguments."""
        call = self._find(where) or self._latest()
        if call is not None and isinstance(fragment, str) and fragment:
            self._add(call, fragment)

    def complete(self, where: Mapping[str, Any], arguments: Any) -> None:
        """The whole arguments of a call, of which the pieces may have come already."""
        call = self._find(where) or self._latest()
        if call is not None:
            self._complete(call, arguments)

    def end(self) -> None:
        """The response is over: publish what was held back and never got its end."""
        for call in self._calls:
            self._unwrap(call)

    def _open(self, call_id: str, name: str, arguments: str, where: Mapping[str, Any]) -> _Call:
        call = _Call(call_id, name, arguments=arguments, has_arguments=bool(arguments))
        self._calls.append(call)
        if call_id:
            self._by_name["call_id", call_id] = call
        self._remember(call, where)
        if name not in _WRAPPERS:
            self._publish(call)
        return call

    def _publish(self, call: _Call) -> None:
        call.index = self._published
        self._published += 1
        reasoning, self._reasoning = self._reasoning, []
        extra = {"reasoning": reasoning} if reasoning else None
        self._emit(call.index, call_id=call.id or None, name=call.name or None, arguments=call.arguments, extra=extra)

    def _add(self, call: _Call, fragment: str) -> None:
        call.has_arguments = True
        if call.index is None:
            call.arguments += fragment
        else:
            self._emit(call.index, arguments=fragment)

    def _complete(self, call: _Call, arguments: Any) -> None:
        if call.is_done:
            return
        if not call.has_arguments and (text := json_text(arguments)):
            self._add(call, text)
        call.is_done = call.has_arguments
        if call.is_done:
            self._unwrap(call)

    def _unwrap(self, call: _Call) -> None:
        """Publish the calls inside a wrapper, or the call itself if it is none after all."""
        if call.index is not None:
            return
        inner = _wrapped(call.arguments)
        if not inner:
            self._publish(call)
            return
        call.index = -1
        for number, (name, arguments) in enumerate(inner, 1):
            self._emit(self._published, call_id=f"{call.id}_{number}", name=name, arguments=arguments)
            self._published += 1

    def _find(self, where: Mapping[str, Any]) -> _Call | None:
        for name in ("output_index", "item_id"):
            if (call := self._by_name.get((name, _key(where.get(name))))) is not None:
                return call
        return None

    def _latest(self) -> _Call | None:
        """The call that an event without a known place is for; a call that is done gets no more."""
        return self._calls[-1] if self._calls and not self._calls[-1].is_done else None

    def _remember(self, call: _Call, where: Mapping[str, Any]) -> None:
        for name in ("output_index", "item_id"):
            if (key := _key(where.get(name))) is not None:
                self._by_name[name, key] = call


def _wrapped(arguments: str) -> list[tuple[str, str]]:
    """Name and arguments of each call inside a wrapper; none if it has another shape."""
    try:
        uses = orjson.loads(arguments)["tool_uses"]
        calls = [(use["recipient_name"].removeprefix("functions."), use["parameters"]) for use in uses]
        return [(name, orjson.dumps(plain(parameters)).decode()) for name, parameters in calls]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def _word(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _key(value: Any) -> int | str | None:
    return value if isinstance(value, (int, str)) else None
