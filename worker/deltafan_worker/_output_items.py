"""The tool calls of a response, which are spread over the events of its output items."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
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


_PLACES = ("item_id", "output_index")
"""By which an event tells what call it is for."""

_MOST_EARLY_PLACES = 1_024
"""From then on none is noted: some servers give each event an id of its own."""

_UNWRAPPED = -1
"""The index of a wrapper whose calls were published in its stead."""

_ELBOW_ROOM = 8
"""How much longer the same arguments may be in other white space and escapes."""


@dataclass(slots=True, eq=False)
class _Call:
    id: str
    name: str
    announced: str = ""
    """Arguments of an item that merely began: the pieces may spell them out again."""
    index: int | None = None
    """Its number among the published ones; None while it is held back."""
    pieces: list[str] = field(default_factory=list)
    is_done: bool = False
    has_ended: bool = False
    """Whether its item has its end, which comes once, be it under another id."""
    lacks_beginning: bool = False
    """Whether pieces came before it: those behind them make no whole."""

    @property
    def arguments(self) -> str:
        """Joined once, however often they are asked for."""
        if len(self.pieces) > 1:
            self.pieces = ["".join(self.pieces)]
        return self.pieces[0] if self.pieces else ""

    def may_be(self, name: str, arguments: str) -> bool:
        """Whether the item of another id may be this call."""
        if self.has_ended or (name and self.name and name != self.name):
            return False
        said = self.arguments
        if arguments.startswith(said):
            return True
        return len(said) <= _ELBOW_ROOM * len(arguments) and _canonical(said) == _canonical(arguments)


class OutputCalls:
    """Tool calls, from items, argument deltas and finished arguments in whatever mixture a server sends.

    A call is known by its call_id, its item's id, its index, in this order: servers give several calls one index, or
    another one to an item that ends. What ends under three new names is another call. A call of which a piece
    comes before it begins is published with its end.
    """

    def __init__(self, emit: EmitToolCall) -> None:
        self._emit = emit
        self._calls: list[_Call] = []
        self._by_name: dict[tuple[str, int | str], _Call] = {}
        self._kinds: set[str] = set()
        self._early: set[tuple[str, int | str]] = set()
        """Places of pieces for which there was no call."""
        self._published = 0
        self._reasoning: list[Mapping[str, Any]] = []
        self._thoughts: set[Any] = set()
        self._doubtful: defaultdict[tuple[str, str], list[_Call]] = defaultdict(list)

    def __bool__(self) -> bool:
        return bool(self._calls)

    def settle(self, items: Iterable[Mapping[str, Any]]) -> None:
        """The final object has these calls. Another one may be any of them that is as yet unknown."""
        found = {self._named(item) for item in items}
        for call in reversed(self._calls):
            if call not in found:
                self._doubtful[call.name, _canonical(call.arguments)].append(call)

    def take_item(self, item: Mapping[str, Any], place: Mapping[str, Any], *, is_done: bool) -> None:
        """An item that is a call: added, done, or found in the final object."""
        name, arguments = _word(item.get("name")), json_text(item.get("arguments", item.get("input")))
        where = {**place, "item_id": item.get("id")}
        call = self._named(item)
        if call and call.has_ended and not is_done and call not in self._at({"item_id": item.get("id")}):
            call = None  # Another item, which only has the same call_id.
        if call is None and (is_done or not _call_id(item)):
            call = self._taken_for(name, arguments, where)
        if call is None:
            call = self._open(_call_id(item), name, arguments if is_done else "")
        self._complete_names(call, _call_id(item), name)
        self._remember(call, _call_id(item), where, is_done=is_done)
        if is_done:
            self._complete(call, arguments)
            call.has_ended = True
        else:
            call.announced = arguments
            call.lacks_beginning |= not (call.pieces or self._early.isdisjoint(_places(where)))
        self._early.difference_update(_places(where))

    def take_reasoning(self, item: Mapping[str, Any]) -> None:
        """Reasoning that only the provider can read, and must have back with the call that it led to."""
        if (thought := _word(item.get("encrypted_content"))) and thought not in self._thoughts:
            self._thoughts.add(thought)
            self._reasoning.append(item)

    def add(self, where: Mapping[str, Any], fragment: Any) -> None:
        """A piece of a call's arguments. What comes behind their end repeats them."""
        if not isinstance(fragment, str) or not fragment:
            return
        if (call := self._find(where)) is None:
            self._early.update(_places(where) if len(self._early) < _MOST_EARLY_PLACES else ())
            return
        if call.lacks_beginning or call.is_done:
            return
        told = call.announced
        if not (call.pieces or told.startswith(fragment) or fragment.startswith(told) or told == "{}"):
            fragment = told + fragment
        self._add(call, fragment)

    def complete(self, where: Mapping[str, Any], arguments: Any) -> None:
        """The whole arguments of a call, of which the pieces may have come already."""
        if (call := self._find(where)) is not None:
            self._complete(call, json_text(arguments))

    def end(self) -> None:
        """The response is over: publish what was held back and never got its end."""
        for call in self._calls:
            self._complete(call, "")
            self._unwrap(call)

    def _open(self, call_id: str, name: str, arguments: str) -> _Call:
        call = _Call(call_id, name, pieces=[arguments] if arguments else [])
        self._calls.append(call)
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

    def _complete(self, call: _Call, arguments: str) -> None:
        """Publish what of the arguments only their end brings."""
        whole, said = arguments or call.announced, call.arguments
        if call.index != _UNWRAPPED and len(whole) > len(said) and whole.startswith(said):
            self._add(call, whole[len(said) :])
        if call.pieces:
            call.is_done = True
            self._unwrap(call)

    def _complete_names(self, call: _Call, call_id: str, name: str) -> None:
        """Publish what the item lacked when it began."""
        news = {"call_id": "" if call.id else call_id, "name": "" if call.name else name}
        call.id, call.name = call.id or call_id, call.name or name
        if call.index not in (None, _UNWRAPPED) and any(news.values()):
            self._emit(call.index, call_id=news["call_id"] or None, name=news["name"] or None)

    def _unwrap(self, call: _Call) -> None:
        """Publish the calls inside a wrapper, or the call itself if it is none after all."""
        if call.index is not None:
            return
        inner = _wrapped(call.arguments)
        if not inner:
            self._publish(call)
            return
        call.index = _UNWRAPPED
        for number, (name, arguments) in enumerate(inner, 1):
            self._emit(self._published, call_id=f"{call.id}_{number}", name=name, arguments=arguments)
            self._published += 1

    def _named(self, item: Mapping[str, Any]) -> _Call | None:
        """The call that goes by an item's ids. The final object may leave out the call_id."""
        if call_id := _word(item.get("call_id")):
            return self._by_name.get(("call_id", call_id))
        return next(self._at({"item_id": item.get("id")}), None)

    def _taken_for(self, name: str, arguments: str, where: Mapping[str, Any]) -> _Call | None:
        """A call under another id that says the same or stands in that place."""
        alike = (self._doubtful.get((name, text)) for text in (_canonical(arguments), "")) if self._doubtful else ()
        if (call := next((calls.pop() for calls in alike if calls), None)) is not None:
            return call
        return next((call for call in self._at(where) if call.may_be(name, arguments)), None)

    def _find(self, where: Mapping[str, Any]) -> _Call | None:
        """The call that an event is for: the latest one, if no call is known by names of that kind."""
        is_named = any(place_name(where.get(kind)) is not None for kind in self._kinds.intersection(_PLACES))
        latest = [] if is_named else self._calls[-1:]
        return next((call for call in chain(self._at(where), latest) if not call.has_ended), None)

    def _at(self, where: Mapping[str, Any]) -> Iterator[_Call]:
        """The calls that a place may mean, the likeliest first. Some servers call an item by its call_id."""
        item_id, index = place_name(where.get("item_id")), place_name(where.get("output_index"))
        for kind, name in (("item_id", item_id), ("call_id", item_id), ("output_index", index)):
            if name is not None and (call := self._by_name.get((kind, name))) is not None:
                yield call

    def _remember(self, call: _Call, call_id: str, where: Mapping[str, Any], *, is_done: bool) -> None:
        """Note a call's names. One that begins takes the index of another, one that ends does not."""
        own = [("call_id", call_id)] if call_id else []
        for kind, name in (*own, *_places(where)):
            self._kinds.add(kind)
            if not (is_done and (kind, name) in self._by_name):
                self._by_name[kind, name] = call


def _places(where: Mapping[str, Any]) -> list[tuple[str, int | str]]:
    """The names of the item that an event is for."""
    return [(kind, name) for kind in _PLACES if (name := place_name(where.get(kind))) is not None]


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
