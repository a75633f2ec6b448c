"""Which texts were published already, of all that is sent again when a part, an item or the response ends."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any

Part = tuple[str, int | None]
"""Which text of an item: of its `content` or its `summary`, and its number there. Many servers do not number them."""

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
        if (item_id := place_name(where.get("item_id"))) is None or ("item_id", item_id) not in self._by_name:
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
        found = {self._by_name.get(("item_id", key)) for item_id in ids if (key := place_name(item_id)) is not None}
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
            if (key := place_name(where.get(name))) is not None:
                self._by_name[name, key] = item
        return item

    def _find(self, where: Mapping[str, Any]) -> _Item | None:
        item_id, index = place_name(where.get("item_id")), place_name(where.get("output_index"))
        if item_id is None and index is None:
            return self._nameless
        by_id = None if item_id is None else self._by_name.get(("item_id", item_id))
        return by_id or (None if index is None else self._by_name.get(("output_index", index)))


def _words(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass").translate(None, b" \t\n\v\f\r")


def place_name(value: Any) -> int | str | None:
    """An id or an index. An empty one names nothing."""
    return value if isinstance(value, (int, str)) and value != "" and not isinstance(value, bool) else None
