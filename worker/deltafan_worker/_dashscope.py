"""DashScope's native API: generations of its text and of its multimodal endpoint."""

import json
import re
from collections.abc import Mapping
from typing import Any

from deltafan._events import CONTENT, REASONING, Delta
from deltafan_worker._alike import Piece
from deltafan_worker._cumulative import Increments
from deltafan_worker._decoder import Completion
from deltafan_worker._frames import TRUNCATED, FrameDecoder, is_placeholder, only_text, text_of
from deltafan_worker._sse import SseEvent
from deltafan_worker._tool_calls import ToolCallMerger
from deltafan_worker._upstream_error import UpstreamError, from_payload

_RUNNING = (None, "", "null")
"""The API writes the word null for an answer that goes on."""
_TEXTS = {"content": CONTENT, "reasoning_content": REASONING}
_JSON_IN_STRING = re.compile(r'\s*\[\s*\{\s*"text"\s*:\s*"')
_TEXT_IN_JSON = re.compile(r'"text"\s*:\s*"((?:[^"\\]|\\(?:[^u]|u[0-9a-fA-F]{4}))*)')


class DashScopeDecoder(FrameDecoder):
    """Decodes one generation. See `Decoder` for how to drive it.

    Increments are asked for, but a server may send everything so far with each frame all the same: both are read. The
    models for deep research have a message in place of choices, and misspell how they have finished.
    """

    def __init__(self, model: str = "") -> None:
        super().__init__()
        self._tool_calls = ToolCallMerger()
        self._increments = Increments(self._emit)
        self._sse_ended = False
        # Of one family of models the content is known to be a string of JSON.
        self._may_be_json = "kimi" in model.lower()

    def completion(self) -> Completion:
        """How the answer ended.

        Raises:
            UpstreamError: code `truncated`, no frame had a finish_reason.
        """
        if self._finish_reason is None:
            raise UpstreamError(code="truncated", message=TRUNCATED, retryable=True)
        return Completion(self._finish_reason)

    def end(self) -> None:
        """There are no more bytes."""
        super().end()
        self._sse_ended = True

    def next_delta(self) -> Delta | None:
        """The next delta; see `FrameDecoder.next_delta`."""
        delta = super().next_delta()
        if delta is None and self._sse_ended:
            self._increments.end()
            return super().next_delta()
        return delta

    def _take_object(self, frame: dict[str, Any], event: SseEvent) -> None:
        self._note_usage(frame.get("usage"))
        self._note_id(frame.get("request_id"))
        if self._finish_reason is not None:
            return
        output = frame.get("output")
        if _is_error(frame, event):
            self._increments.end()
            self._fail(from_payload(frame, status=event.status))
        elif isinstance(output, dict):
            self._take_output(output)

    def _is_keep_alive(self, frame: Mapping[str, Any]) -> bool:
        output = frame.get("output")
        message = output.get("message") if isinstance(output, dict) else None
        return isinstance(message, dict) and message.get("phase") == "KeepAlive"

    def _piece(self, frame: Mapping[str, Any]) -> Piece | None:
        output = frame.get("output")
        may_be_odd = self._may_be_json or not self._increments.are_plain
        if not isinstance(output, dict) or may_be_odd or (self.response_id is None and "request_id" in frame):
            return None
        is_only_choice = not any(value for key, value in output.items() if key != "choices")
        return only_text(_first_choice(output).get("message"), _TEXTS) if is_only_choice else None

    def _take_output(self, output: Mapping[str, Any]) -> None:
        choice = _first_choice(output)
        message = choice.get("message", output.get("message"))
        self._take_message(message if isinstance(message, dict) else {"content": output.get("text")})
        search = output.get("search_info")
        if isinstance(search, dict):
            self._emit_annotations(search.get("search_results"))
        self._emit_annotations(output.get("tool_info"))
        if isinstance(audio := output.get("audio"), dict):
            self._emit_audio(audio.get("data"), audio.get("transcript"))
        reason = choice.get("finish_reason", output.get("finish_reason", output.get("fininshed_reason")))
        if reason not in _RUNNING and isinstance(reason, str):
            self._increments.end()
            self._finish(reason)
            self.finished = True

    def _take_message(self, message: Mapping[str, Any]) -> None:
        content, fragments = message.get("content"), message.get("tool_calls")
        reasoning = message.get("reasoning_content")
        texts = [(REASONING, text_of(reasoning)), (CONTENT, self._text(content))]
        if is_placeholder(reasoning, content, fragments):
            texts[0] = (REASONING, "")
        if is_placeholder(content, reasoning, fragments):
            texts[1] = (CONTENT, "")
        self._increments.take(texts)
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and isinstance(audio := part.get("audio"), dict):
                self._emit_audio(audio.get("data"), audio.get("transcript"))
        if isinstance(fragments, list) and fragments:
            self._increments.end()
            self._take_tool_calls(fragments)

    def _take_tool_calls(self, fragments: list[Any]) -> None:
        for fragment in fragments:
            if isinstance(fragment, dict):
                is_snapshot = self._increments.are_cumulative or "index" not in fragment
                merged = self._tool_calls.take(fragment, is_snapshot=is_snapshot)
                if merged is not None:
                    index, id_, name, arguments = merged
                    self._emit_tool_call(index, call_id=id_, name=name, arguments=arguments)

    def _text(self, content: Any) -> str:
        if self._may_be_json and isinstance(content, str) and _JSON_IN_STRING.match(content):
            return "".join(map(_unescaped, _TEXT_IN_JSON.findall(content)))
        return text_of(content)


def _unescaped(piece: str) -> str:
    try:
        return str(json.loads(f'"{piece}"', strict=False))
    except ValueError:  # models write escapes that JSON does not know
        return piece


def _first_choice(output: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = output.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict) and choice.get("index") in (0, None):
            return choice
    return {}


def _is_error(frame: Mapping[str, Any], event: SseEvent) -> bool:
    if event.event == b"error" or (event.status or 0) >= 400:
        return True
    if frame.get("code") or frame.get("error"):
        return True
    return not isinstance(frame.get("output"), dict) and bool(frame.get("message"))
