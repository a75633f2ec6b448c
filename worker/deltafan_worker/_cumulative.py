"""Telling increments from texts that are sent anew, and longer, with each frame.

One frame can not tell: after "1", a "10" is the next digits or the text so far. So a stream is taken for increments
unless each of its first texts begins with the one before, and while that is open nothing is published.
"""

from collections.abc import Callable, Sequence

_PROOF_TEXTS = 3
"""So many texts, each longer than the one before and beginning with it, are no chance."""
_PROOF_CHARS = 4
"""And, where an answer ends before that, so long a beginning is none."""


class Increments:
    """Publishes what is new of each kind of text. `end` settles what is still open."""

    def __init__(self, emit: Callable[[str, str], None]) -> None:
        self._emit = emit
        self._seen: dict[str, str] = {}
        self._held: list[tuple[str, str]] = []
        self._is_open = True
        self.are_cumulative = False

    @property
    def are_plain(self) -> bool:
        """Whether each text is known to be published as it comes."""
        return not (self._is_open or self.are_cumulative)

    def take(self, texts: Sequence[tuple[str, str]]) -> None:
        """One frame's texts, by kind."""
        for kind, text in texts:
            if not text:
                continue
            if self.are_cumulative:
                self._emit(kind, self._news(kind, text))
            elif self._is_open:
                self._weigh(kind, text)
            else:
                self._emit(kind, text)

    def end(self) -> None:
        """There will be no more to judge by."""
        if self._is_open:
            self._settle(cumulative=len(self._held) > 1 and len(self._held[0][1]) >= _PROOF_CHARS)

    def _weigh(self, kind: str, text: str) -> None:
        if not self._held:
            self._held.append((kind, text))
            # The first text is the same either way.
            self._emit(kind, text)
            return
        first_kind, last = self._held[0][0], self._held[-1][1]
        self._held.append((kind, text))
        if kind != first_kind or not text.startswith(last):
            self._settle(cumulative=False)
        elif text == last:  # the last frame often repeats the one before
            self._settle(cumulative=len(self._held) == _PROOF_TEXTS and len(last) >= 2 * _PROOF_CHARS)
        elif len(self._held) == _PROOF_TEXTS:
            self._settle(cumulative=True)

    def _settle(self, *, cumulative: bool) -> None:
        self._is_open = False
        self.are_cumulative = cumulative
        held, self._held = self._held, []
        if cumulative and held:
            self._seen[held[0][0]] = held[0][1]
        for kind, text in held[1:]:
            self._emit(kind, self._news(kind, text) if cumulative else text)

    def _news(self, kind: str, text: str) -> str:
        seen = self._seen.get(kind, "")
        if seen.startswith(text):  # repeated, or cut short: nothing new
            return ""
        self._seen[kind] = text
        return text.removeprefix(seen)
