"""Events that are the last one again but for their text: recognised by a pattern, and read without being parsed.

Most events of a stream are. The pattern is an event itself, with a hole for its text and one for each value that
differs and says nothing. Whatever JSON string fills the hole for the text, parsing would find the same object as before
with that text in its place.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, cast

import orjson

from deltafan._events import Delta

# Narrower than what `_sse` takes at once: what stands here becomes part of a pattern.
_HEAD = re.compile(rb"(?:event: ?+(?P<name>[^\n\\]*+)\n|id:\d++\n|:HTTP_STATUS/\d{3}\n)*+data: ?+(?=\{)")
_EVENT_NUMBER = re.compile(rb"(?m)(?<=^id:)\d++$")
_PAIR = re.compile(rb'"(?P<key>\w++)": ?+(?:(?P<string>"[^"\\]*+(?:\\.[^"\\]*+)*+")|(?P<number>\d++))')
"""A key with its text or number. None can be found in a text, where each quote is behind a backslash."""
_IDLE = (b"id", b"request_id", b"created", b"sequence_number", b"obfuscation")
"""Keys of values that differ and say nothing. Counts of tokens differ too, and the last ones count."""
_PLACE = b"item_id"

_TEXT_HOLE = rb'(?P<text>"[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+")'
_STRING_HOLE = rb'"[ !#-\[\]-~]*+"'
_PLACE_HOLE = rb"(?P<place>" + _STRING_HOLE + rb")"
_NUMBER_HOLE = rb"(?:0|[1-9]\d{0,17}+)"
"""Those that any parser of JSON takes."""
_LONGEST_BYTES = 2_048
"""Of an event without its text. Compiling takes 1 us for each byte and more, and nothing else is done meanwhile."""

_MOST_PATTERNS = 256
_new = tuple.__new__


class Match(Protocol):
    """A compiled pattern's `match`."""

    def __call__(self, packet: bytes, at: int, /) -> "re.Match[bytes] | None":
        """The event that begins at this byte."""


class Alike:
    """Reads events that are like the one it was made of."""

    __slots__ = ("_kind", "_last", "_match", "_place", "text")

    def __init__(self, kind: str, match: Match, place: bytes | None, text: bytearray | None) -> None:
        self._kind = kind
        self._match = match
        self._place = place
        self._last: bytes | None = None
        self.text = text
        """All that was read, in UTF-8; None if nobody wants it."""

    @property
    def has_read(self) -> bool:
        """Whether there was any such event."""
        return self._last is not None

    def last_object(self) -> dict[str, Any]:
        """What parsing makes of the last event that was read."""
        return cast(dict[str, Any], orjson.loads(self._last or b"{}"))

    def read(self, packet: bytes) -> list[Delta]:
        """The deltas of a packet; none if any of its events is not like the one before, or not whole."""
        deltas: list[Delta] = []
        at, found, match, place = 0, None, self._match, self._place
        while at < len(packet):
            found = match(packet, at)
            if found is None or (place is not None and found["place"] != place):
                return []
            try:
                text = orjson.loads(found["text"]).encode()
            except orjson.JSONDecodeError:
                return []
            if not text:
                return []
            deltas.append(_new(Delta, (self._kind, text)))
            at = found.end()
        if found is not None:
            self._last = found["object"]
        if self.text is not None:
            self.text += b"".join([text for _, text in deltas])
        return deltas


Piece = tuple[str, str]
"""A delta's type, and the key of its text."""


def last_event(packet: bytes) -> bytes:
    """The event that ends a packet: all that is to be kept of it."""
    return packet[packet.rfind(b"\n\n", 0, -1) + 2 :] if packet.count(b"\n\n") > 1 else packet


def alike(
    event: bytes, piece_of: Callable[[bytes, Mapping[str, Any]], Piece | None], *, keeps_text: bool
) -> Alike | None:
    """Events like this one.

    `piece_of` is given its name and its object. It tells of which text the event brings a piece, if it brings
    nothing else, and may be told to others alike without being looked at. None where it does not, or where the event is
    not in the form that all three APIs mostly send.
    """
    head = _HEAD.match(event)
    if head is None or not _is_one_line(event, head.end()):
        return None
    try:
        piece = piece_of(head["name"] or b"", orjson.loads(event[head.end() :]))
    except orjson.JSONDecodeError:
        return None
    return piece and _made_of(event, head.end(), *piece, keeps_text=keeps_text)


def _is_one_line(event: bytes, start: int) -> bool:
    """Whether from there to its end the event is one object on one line."""
    return b"\r" not in event and event.endswith(b"}\n\n") and event.find(b"\n", start) == len(event) - 2


def _made_of(event: bytes, start: int, kind: str, key: str, *, keeps_text: bool) -> Alike | None:
    fixed, holes, places, at = [], [b"(?P<object>"], [], start
    for span, hole in _holes(event, start, key.encode()):
        fixed.append(event[at : span[0]])
        holes.append(hole)
        at = span[1]
        if hole is _PLACE_HOLE:
            places.append(event[slice(*span)])
    fixed.append(event[at:-2])
    if len(places) > 1 or holes.count(_TEXT_HOLE) != 1 or not _has_one(key.encode(), fixed):
        return None
    head = _NUMBER_HOLE.join(map(re.escape, _EVENT_NUMBER.split(event[:start])))
    body = b"".join(hole + re.escape(piece) for hole, piece in zip(holes, fixed, strict=True))
    match = _PATTERNS.match_of(head + body + rb")\n\n")
    if match is None:
        return None
    return Alike(kind, match, places[0] if places else None, bytearray() if keeps_text else None)


def _has_one(key: bytes, fixed: list[bytes]) -> bool:
    """Whether nothing else can have the text's key, however it is written, and the event is not too long."""
    event = b"\x00".join(fixed)
    return event.count(b'"%b"' % key) == 1 and b"\\" not in event and len(event) <= _LONGEST_BYTES


def _holes(event: bytes, start: int, key: bytes) -> Iterator[tuple[tuple[int, int], bytes]]:
    """Where an event's text is, and what may differ; with what each may be."""
    for pair in _PAIR.finditer(event, start):
        name = pair["key"]
        if pair["number"] is not None:
            if name in _IDLE or name.endswith(b"tokens"):
                yield pair.span("number"), _NUMBER_HOLE
        elif name == key:
            yield pair.span("string"), _TEXT_HOLE
        elif name == _PLACE:
            yield pair.span("string"), _PLACE_HOLE
        elif name in _IDLE:
            yield pair.span("string"), _STRING_HOLE


class _Patterns:
    """All streams of a model have the same few, since ids are holes.

    To compile one takes as long as to read a hundred events. So it is done when one comes for the second time: where
    each event has another, none is.
    """

    def __init__(self) -> None:
        self._found: dict[bytes, Match | None] = {}

    def match_of(self, pattern: bytes) -> Match | None:
        """What finds the pattern, unless this is the first that is heard of it."""
        match = self._found.get(pattern)
        if match is None and pattern in self._found:
            match = self._found[pattern] = re.compile(pattern).match
        elif match is None:
            if len(self._found) >= _MOST_PATTERNS:
                self._found.clear()
            self._found[pattern] = None
        return match


_PATTERNS = _Patterns()
