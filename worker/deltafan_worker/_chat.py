"""Chat Completions: the stream of OpenAI's API and of the servers that speak its dialects."""

from collections.abc import Mapping
from typing import Any

from deltafan._events import CONTENT, REASONING, REFUSAL
from deltafan_worker._alike import Piece
from deltafan_worker._decoder import Completion
from deltafan_worker._frames import TRUNCATED, FrameDecoder, is_placeholder, only_text, text_of
from deltafan_worker._sse import SseEvent
from deltafan_worker._tool_calls import ToolCallMerger
from deltafan_worker._upstream_error import UpstreamError, from_error_text, from_payload

_RUNNING = (None, "", "null")
"""What servers put into finish_reason while they generate."""
_TEXTS = {"content": CONTENT, "reasoning_content": REASONING, "reasoning": REASONING}
_FAILED = ("error_finish", "error")
"""And when they fail. DashScope's error_finish has the error's own frame as its content, which is no output."""


class ChatDecoder(FrameDecoder):
    """Decodes one answer: choice 0 of the stream. See `Decoder` for how to drive it."""

    def __init__(self) -> None:
        super().__init__()
        self._tool_calls = ToolCallMerger()

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
        raise UpstreamError(code="truncated", message=TRUNCATED, retryable=True)

    def _take_object(self, frame: dict[str, Any], event: SseEvent) -> None:
        if usage := frame.get("usage"):
            self._note_usage(usage)
        if self.response_id is None:
            self._note_id(frame.get("id"))
        choices = frame.get("choices")
        choice = _first_choice(choices) if choices else None
        if choice is not None:
            self._take_choice(choice, frame)
        if (not choices or event.event or "error" in frame) and _is_error(frame, event):
            self._fail(from_payload(frame, status=event.status))

    def _piece(self, frame: Mapping[str, Any]) -> Piece | None:
        choice = _first_choice(frame.get("choices"))
        if choice is None or "type" in frame or (self.response_id is None and "id" in frame):
            return None
        return only_text(choice.get("delta"), _TEXTS)

    def _take_choice(self, choice: Mapping[str, Any], frame: Mapping[str, Any]) -> None:
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            delta = choice.get("message") if self.frames == 1 else None
        reason = choice.get("finish_reason")
        if reason in _FAILED:
            text = text_of(delta.get("content")) if isinstance(delta, dict) else ""
            self._fail(from_payload(frame) if frame.get("error") else from_error_text(text))
            return
        if isinstance(delta, dict):
            self._take_delta(delta)
        if self._finish_reason is None and reason not in _RUNNING and isinstance(reason, str):
            self._finish(reason)

    def _take_delta(self, delta: dict[str, Any]) -> None:
        content, fragments = delta.get("content"), delta.get("tool_calls")
        reasoning = delta.get("reasoning_content") or delta.get("reasoning")
        if reasoning is not None and not is_placeholder(reasoning, content, fragments):
            self._emit(REASONING, reasoning)
        if content is not None and not is_placeholder(content, reasoning, fragments):
            self._emit(CONTENT, content)
        if (refusal := delta.get("refusal")) is not None:
            self._emit(REFUSAL, refusal)
        if fragments is not None:
            self._take_tool_calls(fragments)
        if isinstance(audio := delta.get("audio"), dict):
            self._emit_audio(audio.get("data"), audio.get("transcript"))
        if (annotations := delta.get("annotations")) is not None:
            self._emit_annotations(annotations)

    def _take_tool_calls(self, fragments: Any) -> None:
        for fragment in fragments if isinstance(fragments, list) else ():
            if isinstance(fragment, dict) and (merged := self._tool_calls.take(fragment)) is not None:
                index, id_, name, arguments = merged
                extra = fragment.get("extra_content")
                kept = {"extra_content": extra} if isinstance(extra, dict) and extra else None
                self._emit_tool_call(index, call_id=id_, name=name, arguments=arguments, extra=kept)


def _first_choice(choices: Any) -> Mapping[str, Any] | None:
    if not isinstance(choices, list):
        return None
    for choice in choices:
        if isinstance(choice, dict) and choice.get("index") in (0, None):
            return choice
    return None


def _is_error(frame: Mapping[str, Any], event: SseEvent) -> bool:
    if frame.get("error") or event.event == b"error":
        return True
    if "choices" in frame:
        return False
    return frame.get("object") == "error" or bool(frame.get("code")) or (event.status or 0) >= 400
