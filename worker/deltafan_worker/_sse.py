"""Server-sent events: bytes in, events out, as model servers really send them.

The standard's rules (WHATWG HTML, "Interpreting an event stream"), and on purpose these divergences:
- an event that is pending at the end of input is delivered: several servers leave out the last blank line;
- an `id:` or `event:` line while data is pending ends the event, and so does data that can only be the next object:
  older gateways leave out all blank lines;
- a block without data, or whose data is empty, is a keep-alive and delivers nothing, whatever else it holds;
- the comment `:HTTP_STATUS/nnn` is kept, the only place where DashScope tells a status inside a 200;
- `id:` and `retry:` have no meaning here: nobody reconnects to a model call.
Lines end in LF, CR or CRLF and nothing else: U+2028 and its kin are text, which is why this works on bytes.
"""

import re
from collections import deque
from typing import NamedTuple

DEFAULT_LIMIT_BYTES = 64 * 1024 * 1024
"""For one event. A whole response with images or audio in base64 comes as one line of many MiB."""

_LINE_BYTES = 64
"""What a line of its own takes in memory, however short it is."""
_LINE_END = re.compile(rb"\r\n|\r|\n")
_STATUS = re.compile(rb":\s*HTTP_STATUS/(\d{3})")
_BOM = b"\xef\xbb\xbf"
_HEAD = re.compile(rb"(?:event: ?+([^\n\r]*+)\n|id:[^\n\r]*+\n|:HTTP_STATUS/(\d{3})\n)*+data: ?+(?=\{)")
"""What stands before an event's object in the form that all three APIs mostly send. Possessive, hence linear."""
_new = tuple.__new__


class SseEvent(NamedTuple):
    """One event. `data` is never empty; `event` is, where the stream names none."""

    event: bytes
    data: bytes
    status: int | None

    def __repr__(self) -> str:
        return f"SseEvent({self.event!r}, {len(self.data)} bytes, {self.status})"


class SseLimitExceeded(Exception):
    """An event is larger than the decoder's limit; the stream can not be read further."""


class SseDecoder:
    """Feed bytes as they come, ask for events until there is none; how the bytes are cut makes no difference.

    Takes time linear in the bytes and holds at most one event of `limit_bytes` beside those not asked for yet.
    """

    def __init__(self, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._events: deque[SseEvent] = deque()
        self._head: bytes | None = b""
        self._line: list[bytes] = []
        self._line_bytes = 0
        self._after_cr = False
        self._data: list[bytes] = []
        self._data_bytes = 0
        self._event = b""
        self._status: int | None = None
        self._exceeded = False

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        if self._exceeded:
            return
        if not (self._line or self._data or self._event or self._head is not None or self._status is not None):
            data = self._without_whole_events(data)
        elif self._head is not None:
            data = self._without_bom(data)
        if self._after_cr and data.startswith(b"\n"):
            data, self._after_cr = data[1:], False
        if not data:
            return
        self._after_cr = data.endswith(b"\r")
        lines = _LINE_END.split(data) if b"\r" in data else data.split(b"\n")
        rest = lines.pop()
        if lines:
            if self._line:
                self._line.append(lines[0])
                lines[0] = b"".join(self._line)
                self._line, self._line_bytes = [], 0
            for line in lines:
                self._take(line)
        if rest:
            self._line.append(rest)
            self._line_bytes += len(rest)
        if self._line_bytes + self._data_bytes > self._limit_bytes:
            self._exceeded = True

    def _without_whole_events(self, data: bytes) -> bytes:
        """Take the first events in one go, each an object on one line. The rules stay those of `_take`."""
        at = 0
        while len(data) <= self._limit_bytes:
            start, name, status = at + 6, None, None
            if not data.startswith(b"data: {", at):
                if (head := _HEAD.match(data, at)) is None:
                    break
                start, (name, status) = head.end(), head.groups()
            end = data.find(b"\n", start)
            if data[end - 1 : end + 2] != b"}\n\n" or data.find(b"\r", start, end) >= 0:
                break
            self._events.append(_new(SseEvent, (name or b"", data[start:end], int(status) if status else None)))
            at = end + 2
        return data[at:] if at else data

    def end(self) -> None:
        """There are no more bytes: what is pending becomes an event."""
        if self._head:
            self._line, self._head = [self._head], None
        if self._line:
            self._take(b"".join(self._line))
            self._line = []
        self._dispatch()

    def next_event(self) -> SseEvent | None:
        """The next event, or None when more bytes are needed.

        Raises:
            SseLimitExceeded: after all events before the one that is too large; then for ever.
        """
        if self._events:
            return self._events.popleft()
        if self._exceeded:
            raise SseLimitExceeded(f"an event is larger than {self._limit_bytes} bytes")
        return None

    def _without_bom(self, data: bytes) -> bytes:
        head = (self._head or b"") + data
        if len(head) < len(_BOM) and _BOM.startswith(head):
            self._head = head
            return b""
        self._head = None
        return head.removeprefix(_BOM)

    def _take(self, line: bytes) -> None:
        if not line:
            self._dispatch()
        elif line.startswith(b"data:"):
            value = line[6:] if line[5:6] == b" " else line[5:]
            if self._data and self._data[-1].endswith(b"}") and value.startswith((b"{", b"[DONE]")):
                self._dispatch()  # no JSON has one of these behind the other
            self._data_bytes += len(value) + (_LINE_BYTES if self._data else 0)
            self._data.append(value)
        elif line.startswith((b"event:", b"id:")):
            if self._data:
                self._dispatch()
            if line.startswith(b"event:"):
                self._event = line[6:].removeprefix(b" ")
        elif (status := _STATUS.match(line)) is not None:
            self._status = int(status[1])

    def _dispatch(self) -> None:
        if self._data:
            data = self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
            if self._data_bytes > self._limit_bytes:
                self._exceeded = True
            elif data.strip():
                self._events.append(SseEvent(self._event, data, self._status))
            self._data, self._data_bytes = [], 0
        self._event, self._status = b"", None
