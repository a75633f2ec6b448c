"""What was said of one kind of text, and whether a text that comes again is in it."""

import re
from dataclasses import dataclass, field

from deltafan_worker._plain import whole_characters

Part = tuple[str, int | None]
"""Which text of an item: of its `content` or its `summary`, and its number there. Many servers do not number them."""

SEARCHED_BYTES = 2**25
"""How much is searched for texts that come again in another order: some 30 ms. From then on they count as news.

Of each kind of text, in each item and in all of them.
"""

_HIGHEST_NUMBER = 1_023
"""Parts with higher numbers are one. Some servers number each delta."""

_WIDE_SPACES = re.compile(r"[^\S\x00-\x7f]")


@dataclass(slots=True, eq=False)
class Words:
    """What was said, in UTF-8 without its white space: servers tidy up what they send again."""

    words: bytearray = field(default_factory=bytearray)
    place: int = 0
    """Behind what came whole, or has its end: what is sent again mostly comes in its order."""
    patience: int = field(default_factory=lambda: SEARCHED_BYTES)

    @property
    def is_open(self) -> bool:
        """Whether something was said that has no end yet."""
        return self.place < len(self.words)

    def add(self, words: bytes, *, is_whole: bool) -> None:
        self.words += words
        if is_whole:
            self.place = len(self.words)

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
            self.place = max(self.place, at + len(words))
        return at >= 0

    def begun(self, words: bytes, since: int) -> int:
        """How many bytes of a whole text were said, if what was said since then is its beginning; 0 if it is not."""
        size = len(self.words) - since
        return size if 0 < size < len(words) and words.startswith(self.words[since:]) else 0


@dataclass(slots=True, eq=False)
class Said(Words):
    """What was said of one kind in one item."""

    of: str = ""
    """Which of its forms was said: providers that show their reasoning repeat it as a summary. "" if nobody knows."""
    numbers: int = 0
    """A bit for each part of which something was said."""
    last: int | None = -1
    are_numbered: bool = True
    half: str = ""
    """The first half of a UTF-16 pair. The next delta has the other one."""
    is_spaced: bool = False
    """Whether it ends with white space."""

    def begin_part(self, number: int | None) -> None:
        """What comes now has this number."""
        if not self.of:
            number = None
        if number == self.last:
            return
        self.last, self.place = number, len(self.words)
        if number is None:
            self.are_numbered = False
        else:
            self.numbers |= _bit(number)

    def has_part(self, words: bytes, number: int | None, parts: int | None) -> bool:
        """Whether some of this part was said, as far as numbers tell."""
        if not self.of:
            return self.is_open and parts in (None, 1)
        if number is None or parts == 1 or self.numbers & _bit(number):
            return True
        return not self.are_numbered and self.begun(words, self.place) > 0

    def joined(self, text: str) -> str:
        """A delta, with the half of a pair that the last one left."""
        text, self.half = self.half + text, ""
        if "\ud800" <= text[-1] <= "\udbff":
            text, self.half = text[:-1], text[-1]
        return text

    def end(self, words: bytes, number: int | None, parts: int | None) -> int:
        """A part has its end. How many bytes of it were said, if only its beginning was; or else 0."""
        if self.are_numbered and number not in (None, self.last) and parts != 1:
            return 0
        size = self.begun(words, self.place) or self.begun(words, 0)
        is_next = self.words.startswith(words, self.place)
        self.place = self.place + len(words) if is_next else len(self.words)
        return size


def words_of(text: str) -> bytes:
    """A text as `Words` keep it."""
    if not text.isascii():
        text = _WIDE_SPACES.sub("", text)
    try:
        data = text.encode()
    except UnicodeEncodeError:
        data = whole_characters(text).encode()
    return data.translate(None, b" \t\n\v\f\r\x1c\x1d\x1e\x1f")


def behind(text: str, size: int) -> str:
    """What of a text is behind so many bytes of its words."""
    start, end = 0, len(text)
    while end - start > 1:
        middle = (start + end) // 2
        between = len(words_of(text[start:middle]))
        if between >= size:
            end = middle
        else:
            start, size = middle, size - between
    return text[end:]


def _bit(number: int) -> int:
    return 1 << min(max(number, 0), _HIGHEST_NUMBER)
