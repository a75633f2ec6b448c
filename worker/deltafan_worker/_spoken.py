"""Which texts were published already, of all that is sent again when a part, an item or the response ends."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deltafan_worker._said import Part, Said, Words, behind, words_of

_MOST_ITEMS = 1_024
"""From then on unknown names count as none: some servers give each event an id of its own."""


@dataclass(slots=True, eq=False)
class _Item:
    id: int | str | None = None
    """None while it has none, or goes by several ones."""
    is_certain: bool = False
    """Whether its texts can be told from those of other items: not while they may go by another name."""
    said: dict[str, Said] = field(default_factory=dict)


class Spoken:
    """Which texts were published already, of all that is sent again with the end of a text, an item, the response.

    Each is known by its item and its part. An item is known by its id, by its index where there is no id or another one
    in each event. Servers that leave both out, or number their items anew, have their texts known by the words: what
    may have been said was said. The final object clears some of it up, as it shows which ids are true. What comes only
    with an end is published behind all that came before it, be it of a later item. Deltas behind an end are news: a
    text that a server sent whole and then in deltas would be doubled.
    """

    def __init__(self) -> None:
        self._nameless = _Item()
        self._items: list[_Item] = []
        self._by_name: dict[tuple[str, int | str], _Item] = {}
        self._together: dict[tuple[str, bool], Words] = {}
        self._speakers: dict[str, _Item] = {}
        """Of each kind, the item that said something last."""
        self._is_settled = False
        self._last_place: tuple[object, ...] | None = None
        """Of the last delta: nearly each goes on where the one before it was, and nothing is to be looked up then."""
        self._last_said = Said()

    def begin(self, where: Mapping[str, Any]) -> None:
        """An item begins, maybe at the index of another one. Its texts may leave out its id."""
        self._last_place = None
        if (item_id := place_name(where.get("item_id"))) is None or ("item_id", item_id) not in self._by_name:
            item = self._open(where)
            item.is_certain = item is not self._nameless

    def goes_on(self, kind: str, where: Mapping[str, Any], part: Part) -> bool:
        """Whether a delta would go on just where the last one was, so that several can be noted as one."""
        place = kind, where.get("item_id"), where.get("output_index"), part
        return place == self._last_place and not self._together and not self._last_said.half

    def note(self, kind: str, text: str, where: Mapping[str, Any], part: Part) -> bool:
        """A delta. False if it is not to be said: it is in another form than what its item said before."""
        place = kind, where.get("item_id"), where.get("output_index"), part
        if place == self._last_place and not self._together:
            said = self._last_said
            said.words += words_of(said.joined(text))
            said.is_spaced = text[-1].isspace()
            return True
        item, (of, number) = self._item(where), part
        said = self._said(item, kind, of)
        if said.of not in ("", of):
            return False
        said.begin_part(number)
        self._add(kind, item, text, words_of(said.joined(text)), is_whole=False)
        self._last_place, self._last_said = place, said
        return True

    def has_all(self, kind: str, text: str, where: Mapping[str, Any]) -> bool:
        """Whether an item's texts are what was said of it, whatever the numbers of its parts."""
        item, words, self._last_place = self._find(where), words_of(text), None
        said = item.said.get(kind) if item else None
        if said is None or not words or not said.words.endswith(words):
            return False
        said.place = len(said.words)
        return True

    def rest(self, kind: str, text: str, where: Mapping[str, Any], part: Part, parts: int | None = None) -> str:
        """What of a whole text is to be said now: what was not said yet, nor may have been.

        `parts` is how many texts of that kind its item has.
        """
        (of, number), words, self._last_place = part, words_of(text), None
        item = self._find_whole(kind, words, where)
        own = item.said.get(kind) if item else None
        if own and item:
            if own.of not in ("", of):
                return ""
            if own.has_part(words, number, parts):
                return self._tail(kind, item, text, words, own.end(words, number, parts))
            is_sure = own.are_numbered and self._is_sure(item, where)
            # Where numbers hold, only the end of a text whose number grew is all that was said under others.
            if (own.words == words and not (is_sure and parts)) or (not is_sure and own.have(words)):
                return ""
        if (rest := self._rest_of_others(kind, text, words, item)) is not None:
            return rest
        self._add_whole(kind, self._item(where) if item else self._open(where), text, words, part)
        return text

    def settle(self, items: Sequence[tuple[Any, Mapping[str, str]]]) -> None:
        """The final object has these items: id, texts by kind. What was said of another one may be of any of them."""
        self._is_settled, self._last_place = True, None
        found = {self._by_name.get(("item_id", key)) for name, _ in items if (key := place_name(name)) is not None}
        for item in self._items:
            item.is_certain = item in found and item.id is not None
        self._together.clear()
        texts = [{kind: words_of(text) for kind, text in by_kind.items()} for _, by_kind in items]
        anywhere = {pair for by_kind in texts for pair in by_kind.items()}
        for name, item in list(self._by_name.items()):
            if name[0] == "output_index" and (item.is_certain or _is_elsewhere(item, texts, anywhere, name[1])):
                del self._by_name[name]

    def _rest_of_others(self, kind: str, text: str, words: bytes, item: _Item | None) -> str | None:
        """The rest of a whole text that other items said or began, as far as words tell; None if none of them did."""
        own = item.said.get(kind) if item else None
        is_known = self._is_settled or bool(item and item.id is not None)
        for is_certain in (False,) if is_known else (False, True):
            others = self._of_several(kind, is_certain=is_certain)
            among_them = own.words if own and item and item.is_certain == is_certain else b""
            if others.have(words, among_them):
                return ""
            speaker = None if among_them else self._speakers.get(kind)
            if speaker is None or speaker.is_certain != is_certain or not speaker.said[kind].is_open:
                continue
            if size := others.begun(words, others.place):
                speaker.said[kind].place, others.place = len(speaker.said[kind].words), len(others.words)
                return self._tail(kind, speaker, text, words, size)
        return None

    def _add_whole(self, kind: str, item: _Item, text: str, words: bytes, part: Part) -> None:
        said = self._said(item, kind, part[0])
        said.begin_part(part[1])
        self._add(kind, item, text, words, is_whole=True)

    def _tail(self, kind: str, item: _Item, text: str, words: bytes, size: int) -> str:
        """What of a text is behind so many bytes that its item said; "" if another one may have said it."""
        if not size or not (item.is_certain or self._speakers[kind] is item):
            return ""
        rest = behind(text, size)
        rest = rest.lstrip() if item.said[kind].is_spaced else rest
        self._add(kind, item, rest, words[size:], is_whole=True)
        return rest

    def _add(self, kind: str, item: _Item, text: str, words: bytes, *, is_whole: bool) -> None:
        said = item.said[kind]
        said.add(words, is_whole=is_whole)
        said.is_spaced = text[-1].isspace()
        self._speakers[kind] = item
        if self._together and (together := self._together.get((kind, item.is_certain))):
            together.add(words, is_whole=is_whole and not together.is_open)

    def _of_several(self, kind: str, *, is_certain: bool) -> Words:
        """What all certain or all uncertain items say, gathered once."""
        if (words := self._together.get((kind, is_certain))) is None:
            several = (*self._items, self._nameless)
            items = [item for item in several if item.is_certain == is_certain and kind in item.said]
            words = Words(bytearray().join(item.said[kind].words for item in items))
            self._together[kind, is_certain] = words
        return words

    def _said(self, item: _Item, kind: str, of: str) -> Said:
        if (said := item.said.get(kind)) is None:
            said = item.said[kind] = Said(of="" if item is self._nameless else of)
        return said

    def _item(self, where: Mapping[str, Any]) -> _Item:
        """The item in which something is to be said."""
        if (item := self._find(where)) is None:
            return self._open(where)
        if place_name(where.get("item_id")) not in (None, item.id):
            item.id = None
        return item

    def _open(self, where: Mapping[str, Any]) -> _Item:
        if len(self._items) >= _MOST_ITEMS:
            return self._nameless
        item_id, index = place_name(where.get("item_id")), place_name(where.get("output_index"))
        self._items.append(item := _Item(item_id, is_certain=self._is_settled))
        if item_id is not None:
            self._by_name["item_id", item_id] = item
        if index is not None:
            self._by_name["output_index", index] = item
        return item

    def _is_sure(self, item: _Item, where: Mapping[str, Any]) -> bool:
        """Whether these names are no other item's."""
        if self._is_settled:
            return item.is_certain
        return item.id is not None and place_name(where.get("item_id")) in (None, item.id)

    def _find_whole(self, kind: str, words: bytes, where: Mapping[str, Any]) -> _Item | None:
        """The item of a whole text: none if an item with an id of its own is at that index and said something else."""
        item, item_id = self._find(where), place_name(where.get("item_id"))
        own = item.said.get(kind) if item and item_id is not None and item.id not in (None, item_id) else None
        is_another = own and not (self._is_settled or own.begun(words, own.place) or own.have(words))
        return None if is_another else item

    def _find(self, where: Mapping[str, Any]) -> _Item | None:
        item_id, index = place_name(where.get("item_id")), place_name(where.get("output_index"))
        if item_id is None and index is None:
            return self._nameless
        by_id = None if item_id is None else self._by_name.get(("item_id", item_id))
        return by_id or (None if index is None else self._by_name.get(("output_index", index)))


def _is_elsewhere(
    item: _Item, texts: Sequence[Mapping[str, bytes]], anywhere: Container[tuple[str, bytes]], index: int | str
) -> bool:
    """Whether the texts of an item stand among others, but at another index than its own."""
    here = texts[index] if isinstance(index, int) and 0 <= index < len(texts) else {}
    own = {kind: bytes(said.words) for kind, said in item.said.items()}
    return any(here.get(kind) != words and (kind, words) in anywhere for kind, words in own.items())


def place_name(value: Any) -> int | str | None:
    """An id or an index. An empty one names nothing."""
    return value if isinstance(value, (int, str)) and value != "" and not isinstance(value, bool) else None
