"""The output items of a response: what was said of each, and the tool calls that are spread over their events."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, Protocol

import orjson

from deltafan_worker._plain import json_text, plain

Part = tuple[str, int | None]
"""Which text of an item: of its `content` or its `summary`, and its number there. Many servers do not number them."""

_WRAPPERS = ("parallel", "multi_tool_use.parallel")
"""A tool that nobody declared: some models wrap several calls in it."""
SEARCHED_BYTES = 2**25
"""How much is searched for texts that come again in another order: some 30 ms. From then on they count as news."""


@dataclass(slots=True, eq=False)
class _Words:
    """What was said, in UTF-8 without its white space: servers tidy up what they send again."""

    words: bytearray = field(default_factory=bytearray)
    place: int = 0
    """Behind what was found last: what is sent again mostly comes in its order."""
    patience: int = field(default_factory=lambda: SEARCHED_BYTES)

    def have(self, words: bytes, own: bytes | bytearray = b"") -> bool:
        """Whether this was said, and by another than the one who said `own` of it all."""
        if not own and self.words.startswith(words, self.place):
            self.place += len(words)
            return bool(self.words)
        self.patience -= len(self.words)
        if self.patience < 0:
            return False
        if own:
            return self.words.count(words) > own.count(words)
        if (at := self.words.find(words)) >= 0:
            self.place = at + len(words)
        return at >= 0


@dataclass(slots=True, eq=False)
class _Said(_Words):
    """What was said of one kind in one item."""

    of: str = ""
    """Which of its forms was said: providers that show their reasoning repeat it as a summary."""
    low: float = inf
    high: float = -inf
    are_numbered: bool = True

    def note_part(self, number: int | None) -> None:
        if number is None:
            self.are_numbered = False
        else:
            self.low, self.high = min(self.low, number), max(self.high, number)

    def may_have(self, words: bytes, number: int | None, parts: int | None) -> bool:
        if number is None or parts == 1 or self.low <= number <= self.high:
            return True
        return not (parts and self.are_numbered) and self.have(words)


@dataclass(slots=True, eq=False)
class _Item:
    is_certain: bool = False
    """Whether its texts can be told from those of other items: not while they may go by another name."""
    said: dict[str, _Said] = field(default_factory=dict)


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
        self._together: dict[tuple[str, bool], _Words] = {}
        self._is_settled = False

    def begin(self, where: Mapping[str, Any]) -> None:
        """An item begins, maybe at the index of another one. Its texts may leave out its id."""
        if (item_id := _key(where.get("item_id"))) is None or ("item_id", item_id) not in self._by_name:
            self._open(where).is_certain = True

    def note(self, kind: str, text: str, where: Mapping[str, Any], part: Part) -> bool:
        """This is to be said there. False if that item is already being said in its other form."""
        item, (of, number) = self._find(where) or self._open(where), part
        if (said := item.said.get(kind)) is None:
            said = item.said[kind] = _Said(of=of)
        elif said.of != of and item is not self._nameless:
            return False
        words = _words(text)
        said.words += words
        if number != said.high:
            said.note_part(number)
        if self._together and (together := self._together.get((kind, item.is_certain))):
            together.words += words
        return True

    def has_all(self, kind: str, text: str, where: Mapping[str, Any]) -> bool:
        """Whether an item's texts are what was said of it, whatever the numbers of its parts."""
        item = self._find(where)
        said = item.said.get(kind) if item else None
        return said is not None and said.words == _words(text)

    def may_have(self, kind: str, text: str, where: Mapping[str, Any], part: Part, parts: int | None = None) -> bool:
        """Whether a whole text was said, or may have been; `parts` is how many texts of that kind its item has."""
        item, words = self._find(where), _words(text)
        own = item.said.get(kind) if item else None
        if own and own.may_have(words, part[1], parts):
            return True
        is_known = self._is_settled or item not in (None, self._nameless)
        for is_certain in (False,) if is_known else (False, True):
            others = self._of_several(kind, is_certain=is_certain)
            among_them = own.words if own and item and item.is_certain == is_certain else b""
            is_begun = others.words and not among_them and others.words in words
            if is_begun or others.have(words, among_them):
                return True
        return False

    def settle(self, ids: Iterable[Any]) -> None:
        """The final object has these items. What was said of another may be of any of them."""
        self._is_settled = True
        found = {self._by_name.get(("item_id", key)) for item_id in ids if (key := _key(item_id)) is not None}
        for item in self._items:
            item.is_certain = item in found
        self._together.clear()
        self._by_name = {
            name: item for name, item in self._by_name.items() if name[0] == "item_id" or not item.is_certain
        }

    def _of_several(self, kind: str, *, is_certain: bool) -> _Words:
        """What all certain or all uncertain items say, gathered once."""
        if (words := self._together.get((kind, is_certain))) is None:
            items = [item for item in self._items if item.is_certain == is_certain and kind in item.said]
            words = _Words(bytearray().join(item.said[kind].words for item in items))
            self._together[kind, is_certain] = words
        return words

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
            if (call := self._by_name.get((name, _key(where.get(name))))) is not None:
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
            if (key := _key(where.get(name))) is not None:
                self._by_name[name, key] = call


def _words(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass").translate(None, b" \t\n\v\f\r")


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


def _key(value: Any) -> int | str | None:
    return value if isinstance(value, (int, str)) else None
