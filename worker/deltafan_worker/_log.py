"""What an attempt has produced, kept until its job has ended: whatever a server loses is written again from here.

Compact, because there is one per live generation: a short delta takes its bytes plus five, where a list of objects
takes over a hundred. Entry n of the log has seq n + 1 in the stream; seq 0 is `started`.

An attempt that continues another keeps that one's deltas before its own: they count for the answer, and are written
again when all of it must be.
"""

from array import array
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from deltafan._events import ANNOTATION, AUDIO, CONTENT, REASONING, REFUSAL, TOOL_CALL, Delta, Event
from deltafan._fold import ToolCall, merge_audio, merge_tool_calls
from deltafan._position import Position
from deltafan._resp import pack

_TYPES = (CONTENT, REASONING, REFUSAL, TOOL_CALL, AUDIO, ANNOTATION)
_CODES = {name: code for code, name in enumerate(_TYPES)}
# What stands between an entry's id and the length of its data, for each type.
_MIDDLES = tuple(pack("type", name, "data").split(b"\r\n", 1)[1] for name in _TYPES)


class AttemptLog:
    """Deltas in order, appended one by one and read back by index."""

    __slots__ = ("_codes", "_data", "_ends", "_kept", "_kept_bytes")

    def __init__(self, kept: Iterable[Delta] = ()) -> None:
        self._codes = bytearray()
        self._ends = array("I")
        self._data = bytearray()
        self._kept_bytes = 0
        self._kept_bytes = self.extend(kept)
        self._kept = len(self._codes)

    def __len__(self) -> int:
        """How many of the deltas are this attempt's own."""
        return len(self._codes) - self._kept

    @property
    def size_bytes(self) -> int:
        """Length of this attempt's own data."""
        return len(self._data) - self._kept_bytes

    def own_all(self) -> None:
        """What was kept is written again as this attempt's own."""
        self._kept = self._kept_bytes = 0

    def extend(self, deltas: Iterable[Delta]) -> int:
        """Add deltas; returns the new `size_bytes`."""
        codes, ends, data = self._codes, self._ends, self._data
        for kind, text in deltas:
            codes.append(_CODES[kind])
            data += text
            ends.append(len(data))
        return len(data) - self._kept_bytes

    def deltas(self) -> list[Delta]:
        """All deltas, kept ones first."""
        return [Delta(event.type, event.data) for event in self.events(0)]

    def events(self, attempt: int) -> Iterator[Event]:
        """All deltas as if they were the entries of one attempt."""
        start = 0
        for index, (code, end) in enumerate(zip(self._codes, self._ends, strict=True)):
            yield Event(Position(attempt, index + 1), _TYPES[code], bytes(self._data[start:end]))
            start = end

    def text(self, kind: str) -> str:
        """All text of one type, joined; the same as folding `events` gives, without making them."""
        code, data, start, pieces = _CODES[kind], self._data, 0, list[bytearray]()
        if code not in self._codes:
            return ""
        for found, end in zip(self._codes, self._ends, strict=True):
            if found == code:
                pieces.append(data[start:end])
            start = end
        return b"".join(pieces).decode()

    def tool_calls(self) -> tuple[ToolCall, ...]:
        """All tool calls, joined from their fragments."""
        return merge_tool_calls(event.tool_call for event in self._of(TOOL_CALL))

    def audio(self) -> tuple[bytes, str]:
        """All speech and its transcript."""
        return merge_audio(event.audio for event in self._of(AUDIO))

    def annotations(self) -> tuple[Mapping[str, Any], ...]:
        """All sources."""
        return tuple(event.payload for event in self._of(ANNOTATION))

    def _of(self, kind: str) -> list[Event]:
        if _CODES[kind] not in self._codes:
            return []
        return [event for event in self.events(0) if event.type == kind]

    def commands(self, head: bytes, attempt: int, first: int) -> list[bytes]:
        """The XADD commands that append own entries `first` … to a stream, packed; `head` is its append_head."""
        ends, codes, kept = self._ends, self._codes, self._kept
        first += kept
        data, start = self._data, ends[first - 1] if first else 0
        commands = []
        for index in range(first, len(codes)):
            end = ends[index]
            entry_id = b"%d-%d" % (attempt, index + 1 - kept)
            commands.append(
                b"%b$%d\r\n%b\r\n%b$%d\r\n%b\r\n"
                % (head, len(entry_id), entry_id, _MIDDLES[codes[index]], end - start, bytes(data[start:end]))
            )
            start = end
        return commands


def append_head(key: str) -> bytes:
    """How every append to a stream begins.

    NOMKSTREAM: a key that has vanished is to be noticed, not made anew without its beginning.
    """
    name = key.encode()
    return b"*8\r\n$4\r\nXADD\r\n$%d\r\n%b\r\n$10\r\nNOMKSTREAM\r\n" % (len(name), name)
