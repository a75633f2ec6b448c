"""The output items of a response: what was said of each, and the tool calls that are spread over their events."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import orjson

from deltafan_worker._plain import json_text, plain

_WRAPPERS = ("parallel", "multi_tool_use.parallel")
"""A tool that nobody declared: some models wrap several calls in it."""


class Part(NamedTuple):
    """Which text of an item: one of its `content` or of its `summary`. Many servers do not number them."""

    of: str
    number: int | None


@dataclass(slots=True, eq=False)
class _Item:
    """What was said of one item, by kind."""

    is_certain: bool = False
    """Whether its texts can be told from those of other items: not while they may go by another name."""
    parts: defaultdict[str, set[Part]] = field(default_factory=lambda: defaultdict(set))
    pieces: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def may_have(self, kind: str, text: str, part: Part, parts: int | None) -> bool:
        said = self.parts[kind]
        if not said or part in said or part.number is None or parts == 1:
            return bool(said)
        if any(one.of != part.of for one in said):  # providers that show their reasoning repeat it as a summary
            return True
        if parts and all(one.number is not None for one in said):
            return False
        return text in "".join(self.pieces[kind])


class Spoken:
    """Which texts were published already, of all that is sent again with the end of a text, an item, the response.

    Each is known by its item and its part. An item is known by its id, by its index where there is no id or another one
    in each event. Servers that leave both out, or number their items anew, have their texts known by the words: what
    may have been said was said. The final object clears some of it up, as it shows which ids are true.
    """

    def __init__(self) -> None:
        self._nameless = _Item()
        self._items = [self._nameless]
        self._by_name: dict[tuple[str, int | str], _Item] = {}
        self._is_settled = False

    def begin(self, where: Mapping[str, Any]) -> None:
        """An item begins, maybe at the index of another one. Its texts may leave out its id."""
        if (item_id := _key(where.get("item_id"))) is None or ("item_id", item_id) not in self._by_name:
            self._open(where).is_certain = True

    def note(self, kind: str, text: str, where: Mapping[str, Any], part: Part) -> None:
        """This was said there."""
        item = self._find(where) or self._open(where)
        item.parts[kind].add(part)
        item.pieces[kind].append(text)

    def may_have(self, kind: str, text: str, where: Mapping[str, Any], part: Part, parts: int | None = None) -> bool:
        """Whether a whole text was said, or may have been; `parts` is the number of parts that its item has."""
        item = self._find(where)
        if item is not None and item.may_have(kind, text, part, parts):
            return True
        is_known = self._is_settled or item not in (None, self._nameless)
        others = [other for other in self._items if other is not item and not (is_known and other.is_certain)]
        said = "".join("".join(other.pieces[kind]) for other in others)
        return bool(said) and (text in said or said in text)

    def settle(self, ids: Iterable[Any]) -> None:
        """The final object has these items. What was said of another may be of any of them."""
        self._is_settled = True
        found = {self._by_name.get(("item_id", key)) for item_id in ids if (key := _key(item_id)) is not None}
        for item in self._items:
            item.is_certain = item in found
        self._by_name = {
            name: item for name, item in self._by_name.items() if name[0] == "item_id" or not item.is_certain
        }

    def _open(self, where: Mapping[str, Any]) -> _Item:
        self._items.append(item := _Item(is_certain=self._is_settled))
        for name in ("output_index", "item_id"):
            if (key := _key(where.get(name))) is not None:
                self._by_name[name, key] = item
        return item

    def _find(self, where: Mapping[str, Any]) -> _Item | None:
        item_id, index = _key(where.get("item_id")), _key(where.get("output_index"))
        if item_id is None and index is None:
            return self._nameless
        by_id = None if item_id is None else self._by_name.get(("item_id", item_id))
        return by_id or (None if index is None else self._by_name.get(("output_index", index)))


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
        self._doubtful: list[_Call] = []

    def __bool__(self) -> bool:
        return bool(self._calls)

    def settle(self, items: Iterable[Mapping[str, Any]]) -> None:
        """The final object has these calls. Another one may be any of them that is as yet unknown."""
        ids = {_call_id(item) for item in items} - {""}
        self._doubtful = [call for call in self._calls if call.id not in ids]

    def take_item(self, item: Mapping[str, Any], place: Mapping[str, Any], *, is_done: bool) -> None:
        """An item that is a call: added, done, or found in the final object."""
        call_id, where = _call_id(item), {**place, "item_id": item.get("id")}
        call = self._by_name.get(("call_id", call_id)) if call_id else self._find(where)
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
            if (call := self._by_name.get((name, _key(where.get(name))))) is not None:
                return call
        return None

    def _taken_for(self, name: str, arguments: str) -> _Call | None:
        """A call of the final object under an id of its own: the same one, as far as anybody can tell."""
        for call in self._doubtful:
            if call.name == name and call.arguments in ("", arguments):
                self._doubtful.remove(call)
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


def _call_id(item: Mapping[str, Any]) -> str:
    return _word(item.get("call_id")) or _word(item.get("id"))


def _word(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _key(value: Any) -> int | str | None:
    return value if isinstance(value, (int, str)) else None
