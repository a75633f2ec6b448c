"""Responses: the typed events of OpenAI's API and of the servers that speak its dialects."""

from collections.abc import Iterator, Mapping
from typing import Any

from deltafan._events import CONTENT, REASONING, REFUSAL
from deltafan_worker._decoder import Completion
from deltafan_worker._frames import TRUNCATED, FrameDecoder
from deltafan_worker._output_items import OutputCalls, Spoken
from deltafan_worker._sse import SseEvent
from deltafan_worker._upstream_error import UpstreamError, from_payload

_TEXT_EVENTS = {
    "response.output_text": CONTENT,
    "response.refusal": REFUSAL,
    "response.reasoning_text": REASONING,
    "response.reasoning_summary_text": REASONING,
}
_CALL_EVENTS = ("response.function_call_arguments", "response.custom_tool_call_input")
_CALL_ITEMS = ("function_call", "custom_tool_call")
_PART_KINDS = {"output_text": CONTENT, "text": CONTENT, "refusal": REFUSAL}
_CUT_SHORT = {"max_output_tokens": "length", "max_tokens": "length"}


class ResponsesDecoder(FrameDecoder):
    """Decodes one response. See `Decoder` for how to drive it.

    Output is told apart by `output_index`, by `item_id` where that is missing: there are servers whose item ids change
    with every event, and servers that give an item another index when it is done. Whatever came as deltas is not
    taken again from the events and objects that repeat it; whatever did not, is.
    """

    def __init__(self) -> None:
        super().__init__()
        self._spoken = Spoken()
        self._calls = OutputCalls(self._emit_tool_call)
        self._summary: tuple[Any, Any] | None = None
        self._whole = False

    def completion(self) -> Completion:
        """How the answer ended.

        Raises:
            UpstreamError: code `truncated`, there was no final event.
        """
        if self._finish_reason is None:
            raise UpstreamError(code="truncated", message=TRUNCATED, retryable=True)
        return Completion(self._finish_reason)

    def feed_whole(self, body: bytes) -> None:
        """Take the response object of a server that ignored the wish for a stream."""
        self._whole = True
        super().feed_whole(body)

    def _take_object(self, frame: dict[str, Any], event: SseEvent) -> None:
        if self._finish_reason is not None:
            return
        kind = frame.get("type") or event.event.decode("utf-8", "replace")
        if self._whole and frame.get("object") == "response":
            frame, kind = {"response": frame}, f"response.{frame.get('status')}"
        if not isinstance(kind, str) or self._take_text(kind, frame) or self._take_call(kind, frame):
            return
        match kind:
            case "response.output_item.added":
                self._take_item(frame.get("item"), frame, is_done=False)
            case "response.output_item.done":
                self._take_item(frame.get("item"), frame, is_done=True)
            case "response.output_text.annotation.added":
                self._emit_annotations([frame.get("annotation")])
            case "response.audio.delta" | "response.output_audio.delta":
                self._emit_audio(frame.get("delta"), None)
            case "response.audio.transcript.delta" | "response.output_audio_transcript.delta":
                self._emit_audio(None, frame.get("delta"))
            case "error":
                self._fail(from_payload(frame, status=event.status))
            case _ if isinstance(response := frame.get("response"), dict):
                self._take_response(kind, response, event.status)
            case _ if _is_error(frame, event):
                self._fail(from_payload(frame, status=event.status))

    def _take_text(self, kind: str, frame: Mapping[str, Any]) -> bool:
        name, _, step = kind.rpartition(".")
        if (spoken_as := _TEXT_EVENTS.get(name)) is None:
            return False
        if step == "delta":
            self._break_between_summaries(name, frame)
            self._say(spoken_as, frame.get("delta"), frame)
        elif step == "done":
            text = frame.get("refusal" if spoken_as == REFUSAL else "text")
            self._say_unless_said(spoken_as, text, frame)
        return True

    def _take_call(self, kind: str, frame: Mapping[str, Any]) -> bool:
        name, _, step = kind.rpartition(".")
        if name not in _CALL_EVENTS:
            return False
        if step == "delta":
            self._calls.add(frame, frame.get("delta"))
        elif step == "done":
            self._calls.complete(frame, frame.get("arguments", frame.get("input")))
        return True

    def _take_item(self, item: Any, place: Mapping[str, Any], *, is_done: bool) -> None:
        if not isinstance(item, dict):
            return
        kind = item.get("type")
        where = {"output_index": place.get("output_index"), "item_id": item.get("id")}
        if kind in _CALL_ITEMS:
            self._calls.take_item(item, place, is_done=is_done)
        elif kind in ("message", "reasoning"):
            if kind == "reasoning" and is_done:
                self._calls.take_reasoning(item)
            self._spoken.open(where)
            for spoken_as, text in _texts(item) if is_done else ():
                self._say_unless_said(spoken_as, text, where)

    def _take_response(self, kind: str, response: Mapping[str, Any], http_status: int | None) -> None:
        self._note_id(response.get("id"))
        self._note_usage(response.get("usage"))
        match kind:
            case "response.failed" | "response.cancelled":
                # Its own error, or at least its status.
                status = {"code": kind.removeprefix("response."), "message": ""}
                self._fail(from_payload({"error": response.get("error") or status}, status=http_status))
            case "response.completed" | "response.incomplete":
                self._take_output(response.get("output"))
                self._calls.end()
                self._finish(self._reason(kind, response))
                self.finished = True

    def _take_output(self, output: Any) -> None:
        """What the final object holds and no event brought. Its items' places need not be their output_index."""
        said = frozenset(self._spoken.kinds)
        for index, item in enumerate(output if isinstance(output, list) else ()):
            if isinstance(item, dict) and item.get("type") in _CALL_ITEMS:
                self._take_item(item, {"output_index": ("final", index)}, is_done=True)
            elif isinstance(item, dict) and item.get("type") in ("message", "reasoning"):
                for spoken_as, text in _texts(item):
                    if spoken_as not in said:
                        self._say(spoken_as, text, {})

    def _reason(self, kind: str, response: Mapping[str, Any]) -> str:
        if kind == "response.incomplete":
            details = response.get("incomplete_details")
            reason = details.get("reason") if isinstance(details, dict) else None
            return _CUT_SHORT.get(reason, reason) if isinstance(reason, str) else "length"
        return "tool_calls" if self._calls else "stop"

    def _say(self, kind: str, text: Any, where: Mapping[str, Any]) -> None:
        if isinstance(text, str) and text:
            self._spoken.note(kind, where)
            self._emit(kind, text)

    def _say_unless_said(self, kind: str, text: Any, where: Mapping[str, Any]) -> None:
        if not self._spoken.has(kind, where):
            self._say(kind, text, where)

    def _break_between_summaries(self, name: str, frame: Mapping[str, Any]) -> None:
        """Parts of a summary are paragraphs, but for the break between them."""
        if name != "response.reasoning_summary_text":
            return
        part = (frame.get("output_index"), frame.get("summary_index"))
        if self._summary is not None and part != self._summary:
            self._emit(REASONING, "\n\n")
        self._summary = part


def _texts(item: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a finished item says: kind and text."""
    is_reasoning = item.get("type") == "reasoning"
    # Providers that show their reasoning repeat it as a summary.
    parts = (item.get("content") or item.get("summary")) if is_reasoning else item.get("content")
    texts: dict[str, list[str]] = {}
    for part in parts if isinstance(parts, list) else ():
        if not isinstance(part, dict):
            continue
        kind = REASONING if is_reasoning else _PART_KINDS.get(str(part.get("type")))
        text = part.get("refusal") if kind == REFUSAL else part.get("text")
        if kind is not None and isinstance(text, str):
            texts.setdefault(kind, []).append(text)
    for kind, pieces in texts.items():
        yield kind, ("\n\n" if is_reasoning else "").join(pieces)


def _is_error(frame: Mapping[str, Any], event: SseEvent) -> bool:
    if "type" in frame and not frame.get("error"):
        return False
    return bool(frame.get("error") or frame.get("code")) or event.event == b"error" or (event.status or 0) >= 400
