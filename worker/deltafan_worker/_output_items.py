"""The tool calls of a response, which are spread over the events of its output items."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

from deltafan_worker._plain import json_text, plain
from deltafan_worker._spoken import place_name

_WRAPPERS = ("parallel", "multi_tool_use.parallel")
"""A tool that nobody declared: some models wrap several calls in it."""


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
    pieces: list[str] = field(default_factory=list)
    is_done: bool = False

    @property
    def arguments(self) -> str:
        return "".join(self.pieces)


class OutputCalls:
    """Tool calls, from items, argument deltas and finished arguments in whatever mixture a server sends."""

    def __init__(self, emit: EmitToolCall) -> None:
        self._emit = emit
        self._calls: list[_Call] = []
        self._by_name: dict[tuple[str, Any], _Call] = {}
        self._published = 0
        self._reasoning: list[Mapping[str, Any]] = []
        self._thoughts: set[Any] = set()
        self._doubtful: defaultdict[tuple[str, str], list[_Call]] = defaultdict(list)

    def __bool__(self) -> bool:
        return bool(self._calls)

    def settle(self, items: Iterable[Mapping[str, Any]]) -> None:
        """The final object has these calls. Another one may be any of them that is as yet unknown."""
        ids = {_call_id(item) for item in items} - {""}
        for call in reversed(self._calls):
            if call.id not in ids:
                self._doubtful[call.name, _canonical(call.arguments)].append(call)

    def take_item(self, item: Mapping[str, Any], place: Mapping[str, Any], *, is_done: bool) -> None:
        """An item that is a call: added, done, or found in the final object."""
        call_id, where = _call_id(item), {**place, "item_id": item.get("id")}
        # The final object may leave out the call_id, and an item may take the index of another one.
        call = None if _word(item.get("call_id")) else self._by_name.get(("item_id", call_id))
        call = call or (self._by_name.get(("call_id", call_id)) if call_id else self._find(where))
        name, arguments = _word(item.get("name")), item.get("arguments", item.get("input"))
        if call is None and (call := self._taken_for(name, json_text(arguments))) is None:
            call = self._open(call_id, name, json_text(arguments), where)
        else:
            self._remember(call, where)
        if is_done:
            self._complete(call, arguments)

    def take_reasoning(self, item: Mapping[str, Any]) -> None:
        """Reasoning that only the provider can read, and must have back with the call that it led to."""
        if (thought := _word(item.get("encrypted_content"))) and thought not in self._thoughts:
            self._thoughts.add(thought)
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
        call = _Call(call_id, name, pieces=[arguments] if arguments else [])
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
        call.pieces.append(fragment)
        if call.index is not None:
            self._emit(call.index, arguments=fragment)

    def _complete(self, call: _Call, arguments: Any) -> None:
        if call.is_done:
            return
        if not call.pieces and (text := json_text(arguments)):
            self._add(call, text)
        call.is_done = bool(call.pieces)
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
            if (call := self._by_name.get((name, place_name(where.get(name))))) is not None:
                return call
        return None

    def _taken_for(self, name: str, arguments: str) -> _Call | None:
        """A call of the final object under an id of its own: the same one, as far as anybody can tell."""
        alike = (self._doubtful.get((name, text)) for text in (_canonical(arguments), ""))
        return next((calls.pop() for calls in alike if calls), None)

    def _latest(self) -> _Call | None:
        """The call that an event without a known place is for; a call that is done gets no more."""
        return self._calls[-1] if self._calls and not self._calls[-1].is_done else None

    def _remember(self, call: _Call, where: Mapping[str, Any]) -> None:
        for name in ("output_index", "item_id"):
            if (key := place_name(where.get(name))) is not None:
                self._by_name[name, key] = call


def _wrapped(arguments: str) -> list[tuple[str, str]]:
    """Name and arguments of each call inside a wrapper; none if it has another shape."""
    try:
        uses = orjson.loads(arguments)["tool_uses"]
        calls = [(use["recipient_name"].removeprefix("functions."), use["parameters"]) for use in uses]
        return [(name, orjson.dumps(plain(parameters)).decode()) for name, parameters in calls]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def _canonical(arguments: str) -> str:
    """Arguments without what may be written otherwise in JSON: white space, escapes, the order of names."""
    try:
        return orjson.dumps(plain(orjson.loads(arguments)), option=orjson.OPT_SORT_KEYS).decode()
    except ValueError:
        return arguments


def _call_id(item: Mapping[str, Any]) -> str:
    return _word(item.get("call_id")) or _word(item.get("id"))


def _word(value: Any) -> str:
    return value if isinstance(value, str) else ""
