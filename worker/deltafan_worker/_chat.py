"""Chat Completions: the stream of OpenAI's API and of the servers that speak its dialects."""

import json
from collections import deque
from collections.abc import Mapping
from typing import Any

import orjson

from deltafan._events import CONTENT, REASONING, REFUSAL, TOOL_CALL, Delta, tool_call_data
from deltafan_worker._decoder import Completion
from deltafan_worker._sse import SseDecoder, SseEvent, SseLimitExceeded
from deltafan_worker._tool_calls import ToolCallMerger
from deltafan_worker._upstream_error import UpstreamError, from_error_text, from_payload

_RUNNING = (None, "", "null")
"""What servers put into finish_reason while they generate."""
_FAILED = ("error_finish", "error")
"""And when they fail. DashScope's error_finish has the error's own frame as its content, which is no output."""


class ChatDecoder:
    """Decodes one answer: choice 0 of the stream. See `Decoder` for how to drive it."""

    def __init__(self) -> None:
        self.frames = 0
        self.finished = False
        self.usage: Mapping[str, Any] | None = None
        self.response_id: str | None = None
        self._sse = SseDecoder()
        self._deltas: deque[Delta] = deque()
        self._error: UpstreamError | None = None
        self._finish_reason: str | None = None
        self._tool_calls = ToolCallMerger()
        self._held: dict[str, str] = {}
        self._said_something = False

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the stream."""
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
                self._error = UpstreamError(code="frame_too_long", message=str(error), retryable=False)
                continue
            if event is None:
                return None
            self._take_frame(event)
        return self._deltas.popleft()

    def completion(self) -> Completion:
        """How the answer ended.

        A stream that just stops has been cut, however much of it there is; `[DONE]` is a server's word that all was
        said, for those that never send a finish_reason.

        Raises:
            UpstreamError: code `truncated`.
        """
        if self._finish_reason is not None:
            return Completion(self._finish_reason)
        if self.finished and self._said_something:
            return Completion("stop")
        raise UpstreamError(code="truncated", message="the stream ended without a finish_reason", retryable=True)

    def _take_frame(self, event: SseEvent) -> None:
        data = event.data
        if data.startswith(b"[DONE]"):
            self.finished = True
            return
        try:
            chunk = _parse(data)
        except ValueError:
            lines = [line for line in data.split(b"\n") if line.strip()]
            if len(lines) > 1:  # frames of a server that leaves out the blank lines between them
                for line in lines:
                    self._take_frame(event._replace(data=line))
            elif self._error is None:
                message = "the provider sent a frame that is not a JSON object"
                self._error = UpstreamError(code="bad_frame", message=message, retryable=True)
            return
        self.frames += 1
        if self._error is None:
            self._take_chunk(chunk, event)

    def _take_chunk(self, chunk: dict[str, Any], event: SseEvent) -> None:
        if (usage := chunk.get("usage")) and isinstance(usage, dict):
            self.usage = usage
        if self.response_id is None and isinstance(identifier := chunk.get("id"), str) and identifier:
            self.response_id = identifier
        choices = chunk.get("choices")
        choice = _first_choice(choices) if choices else None
        if choice is not None:
            self._take_choice(choice, chunk)
        # An error behind a finish_reason takes nothing back of an answer that is complete.
        if self._error is None and self._finish_reason is None and _is_error(chunk, event):
            self._error = from_payload(chunk, status=event.status)

    def _take_choice(self, choice: Mapping[str, Any], chunk: Mapping[str, Any]) -> None:
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            delta = choice.get("message") if self.frames == 1 else None
        reason = choice.get("finish_reason")
        if reason in _FAILED and self._finish_reason is None:
            text = _text(delta.get("content")) if isinstance(delta, dict) else ""
            self._error = from_payload(chunk) if chunk.get("error") else from_error_text(text)
            return
        if isinstance(delta, dict):
            self._take_delta(delta)
        if self._finish_reason is None and reason not in _RUNNING and isinstance(reason, str):
            self._finish_reason = reason
            self._release_held()

    def _take_delta(self, delta: dict[str, Any]) -> None:
        if (reasoning := delta.get("reasoning_content") or delta.get("reasoning")) is not None:
            self._emit(REASONING, reasoning)
        if (content := delta.get("content")) is not None:
            self._emit(CONTENT, content)
        if (refusal := delta.get("refusal")) is not None:
            self._emit(REFUSAL, refusal)
        if (fragments := delta.get("tool_calls")) is not None:
            self._take_tool_calls(fragments)

    def _take_tool_calls(self, fragments: Any) -> None:
        for fragment in fragments if isinstance(fragments, list) else ():
            if isinstance(fragment, dict) and (merged := self._tool_calls.take(fragment)) is not None:
                self._said_something = True
                index, id_, name, arguments = merged
                self._deltas.append(
                    Delta(TOOL_CALL, tool_call_data(index, call_id=id_, name=name, arguments=arguments))
                )

    def _emit(self, kind: str, value: Any) -> None:
        text = value if isinstance(value, str) else _text(value)
        if self._held:
            text = self._held.pop(kind, "") + text
        if not text:
            return
        self._said_something = True
        try:
            self._deltas.append(Delta(kind, text.encode()))
        except UnicodeEncodeError:
            self._emit_surrogates(kind, text)

    def _emit_surrogates(self, kind: str, text: str) -> None:
        """Text with halves of UTF-16 pairs: join what belongs together, also over two deltas; replace the rest."""
        if "\ud800" <= text[-1] <= "\udbff":
            self._held[kind] = text[-1]
            text = text[:-1]
        if text:
            self._deltas.append(
                Delta(kind, text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode())
            )

    def _release_held(self) -> None:
        while self._held:
            kind, _ = self._held.popitem()
            self._deltas.append(Delta(kind, "\N{REPLACEMENT CHARACTER}".encode()))


def _parse(data: bytes) -> dict[str, Any]:
    """A frame's object.

    Raises:
        ValueError: it is none.
    """
    try:
        chunk = orjson.loads(data)
    except orjson.JSONDecodeError:
        chunk = _parse_leniently(data)
    if not isinstance(chunk, dict):
        raise ValueError("not an object")
    return chunk


def _parse_leniently(data: bytes) -> Any:
    """What orjson refuses and servers send: halves of UTF-16 pairs, NaN among the logprobs, broken UTF-8."""
    try:
        return json.loads(data.decode("utf-8", "replace"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _first_choice(choices: Any) -> Mapping[str, Any] | None:
    if not isinstance(choices, list):
        return None
    for choice in choices:
        if isinstance(choice, dict) and choice.get("index") in (0, None):
            return choice
    return None


def _is_error(chunk: Mapping[str, Any], event: SseEvent) -> bool:
    if chunk.get("error") or event.event == b"error":
        return True
    if "choices" in chunk:
        return False
    return chunk.get("object") == "error" or bool(chunk.get("code")) or (event.status or 0) >= 400


def _text(value: Any) -> str:
    """Text given as a string or as a list of parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(part["text"] for part in value if isinstance(part, dict) and isinstance(part.get("text"), str))
    return ""
