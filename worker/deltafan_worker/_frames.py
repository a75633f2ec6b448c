"""What the decoders of all APIs share: frames of JSON in, deltas out, the first error last."""

import json
from base64 import b64decode
from collections import deque
from collections.abc import Mapping
from typing import Any

import orjson

from deltafan._events import ANNOTATION, AUDIO, TOOL_CALL, Delta, audio_data, tool_call_data
from deltafan_worker._alike import Alike, Piece, alike, last_event
from deltafan_worker._plain import plain, whole_characters
from deltafan_worker._sse import SseDecoder, SseEvent, SseLimitExceeded
from deltafan_worker._upstream_error import UpstreamError

_KEEP_ALIVES = ("ping", "keepalive", "keep-alive", "heartbeat")
_KEEP_ALIVE_EVENTS = frozenset(name.encode() for name in _KEEP_ALIVES)
_new = tuple.__new__
_MOST_IN_VAIN = 16
"""So many events in a row might have had others like them and had none, until no more is looked for."""
TRUNCATED = "the stream ended before the answer did"


class FrameDecoder:
    """Base of the decoders. A subclass takes each frame's object in `_take_object` and says how it all ended."""

    _keeps_text = False
    """Whether the texts of plain events are wanted at the end."""

    def __init__(self) -> None:
        self.frames = 0
        self.finished = False
        self.response_id: str | None = None
        self._sse = SseDecoder()
        self._deltas: deque[Delta] = deque()
        self._event: bytes | None = None
        self._alike: Alike | None = None
        self._in_vain = 0
        self._error: UpstreamError | None = None
        self._usage: Mapping[str, Any] | None = None
        self._finish_reason: str | None = None
        self._said_something = False
        self._held: dict[str, str] = {}
        self._audio_rest = ""
        self._annotations: set[bytes] = set()

    @property
    def is_whole(self) -> bool:
        """Whether the answer has its end."""
        return self._finish_reason is not None

    @property
    def usage(self) -> Mapping[str, Any] | None:
        """The last usage object that was not empty."""
        self._catch_up()
        return self._usage

    def read_alike(self, packet: bytes) -> list[Delta]:
        """The deltas of a packet whose events are all like the one before them. Empty: it is to be fed."""
        events = self._alike or self._learn()
        if events is None:
            return []
        deltas = events.read(packet)
        self.frames += len(deltas)
        return deltas

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the stream."""
        self._catch_up()
        if self._alike is not None and self._alike.has_read:
            self._in_vain = 0
        self._alike = None
        self._event = last_event(data) if self._in_vain < _MOST_IN_VAIN else None
        self._sse.feed(data)

    def feed_whole(self, body: bytes) -> None:
        """Take the one JSON object of a server that ignored the wish for a stream."""
        self._take_frame(SseEvent(b"", body, None))
        self.finished = True

    def end(self) -> None:
        """There are no more bytes."""
        self._sse.end()

    def next_delta(self) -> Delta | None:
        """The next delta, or None when more bytes are needed.

        Raises:
            UpstreamError: an error inside the 200; all deltas before it have been given.
        """
        while not self._deltas:
            if self._error is not None:
                raise self._error
            try:
                event = self._sse.next_event()
            except SseLimitExceeded as error:
                self._fail(UpstreamError(code="frame_too_long", message=str(error), retryable=False))
                self.finished = True
                event = None
            if event is not None:
                self._take_frame(event)
            elif self._error is None:
                return None
        return self._deltas.popleft()

    def _piece(self, frame: Mapping[str, Any]) -> Piece | None:
        """Of which text an event brings a piece, if it would change nothing else when it came again with another."""
        raise NotImplementedError

    def _catch_up(self) -> None:
        """Take what the end of an answer needs from events that were not parsed; called as often as that may be."""
        if self._alike is not None and self._alike.has_read:
            self._note_usage(self._alike.last_object().get("usage"))

    def _learn(self) -> Alike | None:
        """Look for what the next events may be like: the last one, which has been taken."""
        event, self._event = self._event, None
        if event is not None and self._finish_reason is None:
            self._alike = alike(event, self._piece_of, keeps_text=self._keeps_text)
        return self._alike

    def _piece_of(self, name: bytes, frame: Mapping[str, Any]) -> Piece | None:
        piece = None if name in _KEEP_ALIVE_EVENTS else self._piece(frame)
        self._in_vain += piece is not None
        return piece

    def _is_keep_alive(self, frame: Mapping[str, Any]) -> bool:
        """Whether a frame says nothing but that the server is there: it does not count against a silence."""
        return frame.get("type") in _KEEP_ALIVES

    def _take_object(self, frame: dict[str, Any], event: SseEvent) -> None:
        """Take one frame; called until there is an error."""
        raise NotImplementedError

    def _take_frame(self, event: SseEvent) -> None:
        name, data, _ = event
        try:
            frame = orjson.loads(data)
        except orjson.JSONDecodeError:
            if data.startswith(b"[DONE]"):
                self.finished = True
                return
            frame = _parse_leniently(data)
        if not isinstance(frame, dict):
            if name not in _KEEP_ALIVE_EVENTS:
                message = "the provider sent a frame that is not a JSON object"
                self._fail(UpstreamError(code="bad_frame", message=message, retryable=True))
            return
        if not (name in _KEEP_ALIVE_EVENTS or self._is_keep_alive(frame)):
            self.frames += 1
        if self._error is None:
            self._take_object(frame, event)

    def _fail(self, error: UpstreamError) -> None:
        """The first error counts. One behind the finish takes nothing back of an answer that is whole."""
        if self._error is None and self._finish_reason is None:
            self._error = error

    def _finish(self, reason: str) -> None:
        """The answer is whole; what waited for its other half will not get it."""
        self._finish_reason = whole_characters(reason)
        while self._held:
            kind, _ = self._held.popitem()
            self._deltas.append(Delta(kind, "\N{REPLACEMENT CHARACTER}".encode()))

    def _note_usage(self, usage: Any) -> None:
        if usage and isinstance(usage, dict):
            self._usage = usage

    def _note_id(self, identifier: Any) -> None:
        if self.response_id is None and identifier and isinstance(identifier, str):
            self.response_id = whole_characters(identifier)

    def _emit(self, kind: str, value: Any) -> None:
        text = value if isinstance(value, str) else text_of(value)
        if self._held:
            text = self._held.pop(kind, "") + text
        if not text:
            return
        self._said_something = True
        try:
            self._deltas.append(_new(Delta, (kind, text.encode())))
        except UnicodeEncodeError:
            self._emit_surrogates(kind, text)

    def _emit_surrogates(self, kind: str, text: str) -> None:
        """Text with halves of UTF-16 pairs: join what belongs together, also over two deltas; replace the rest."""
        if "\ud800" <= text[-1] <= "\udbff":
            self._held[kind] = text[-1]
            text = text[:-1]
        if text:
            self._deltas.append(Delta(kind, whole_characters(text).encode()))

    def _emit_tool_call(
        self,
        index: int,
        *,
        call_id: str | None = None,
        name: str | None = None,
        arguments: str = "",
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self._said_something = True
        try:
            data = tool_call_data(index, call_id=call_id, name=name, arguments=arguments, extra=extra)
        except TypeError:  # orjson's word for halves of UTF-16 pairs
            pieces = [None if text is None else whole_characters(text) for text in (call_id, name, arguments)]
            data = tool_call_data(index, call_id=pieces[0], name=pieces[1], arguments=pieces[2] or "")
        self._deltas.append(Delta(TOOL_CALL, data))

    def _emit_audio(self, base64: Any, transcript: Any) -> None:
        """Each entry's base64 is whole, wherever the provider cuts it; what is none is left out."""
        text = self._audio_rest + (base64 if isinstance(base64, str) else "")
        whole = text[: len(text) - len(text) % 4]
        self._audio_rest = text[len(whole) :]
        if not _is_base64(whole):
            whole = self._audio_rest = ""
        words = whole_characters(transcript) if isinstance(transcript, str) else ""
        if whole or words:
            self._said_something = True
            self._deltas.append(Delta(AUDIO, audio_data(whole, words)))

    def _emit_annotations(self, annotations: Any) -> None:
        """Sources, each once in whatever order its names come: servers repeat the list of them with every frame."""
        for annotation in annotations if isinstance(annotations, list) else ():
            if not isinstance(annotation, dict) or not annotation:
                continue
            source = plain(annotation)
            key = orjson.dumps(source, option=orjson.OPT_SORT_KEYS)
            if key not in self._annotations:
                self._annotations.add(key)
                self._deltas.append(Delta(ANNOTATION, orjson.dumps(source)))


def _parse_leniently(data: bytes) -> Any:
    """What orjson refuses and servers send: halves of UTF-16 pairs, NaN among the logprobs, broken UTF-8.

    None for what is no JSON at all.
    """
    try:
        return json.loads(data.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None


def _is_base64(text: str) -> bool:
    try:
        b64decode(text, validate=True)
    except ValueError:
        return False
    return True


def text_of(value: Any) -> str:
    """Text given as a string or as a list of parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(part["text"] for part in value if isinstance(part, dict) and isinstance(part.get("text"), str))
    return ""


def is_placeholder(value: Any, *others: Any) -> bool:
    """Whether a text is the word "null" that some JSON libraries write for nothing.

    Only beside another kind of output, since a model may well say null.
    """
    return value == "null" and any(others)


def only_text(message: Any, kinds: Mapping[str, str]) -> Piece | None:
    """The one text of a message that brings nothing else; `kinds` tells the types of deltas by their keys."""
    said = [key for key, value in message.items() if value and key != "role"] if isinstance(message, dict) else []
    if len(said) != 1 or said[0] not in kinds or not isinstance(message[said[0]], str):
        return None
    return kinds[said[0]], said[0]
