"""Responses: the typed events of OpenAI's API and of the servers that speak its dialects."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from deltafan._events import CONTENT, REASONING, REFUSAL
from deltafan_worker._alike import Piece
from deltafan_worker._decoder import Completion
from deltafan_worker._frames import TRUNCATED, FrameDecoder
from deltafan_worker._output_items import OutputCalls
from deltafan_worker._said import Part
from deltafan_worker._spoken import Spoken
from deltafan_worker._sse import SseEvent
from deltafan_worker._upstream_error import UpstreamError, from_payload

_TEXT_EVENTS = {
    "response.output_text": (CONTENT, "content"),
    "response.refusal": (REFUSAL, "content"),
    "response.reasoning_text": (REASONING, "content"),
    "response.reasoning_summary_text": (REASONING, "summary"),
}
_CALL_EVENTS = ("response.function_call_arguments", "response.custom_tool_call_input")
_CALL_ITEMS = ("function_call", "custom_tool_call")
_TEXT_ITEMS = ("message", "reasoning")
_PART_KINDS = {"output_text": CONTENT, "text": CONTENT, "refusal": REFUSAL}
_PART_EVENTS = {"response.content_part.done": "content", "response.reasoning_summary_part.done": "summary"}
_REASONING_PARTS = ("reasoning_text", "summary_text")
_CUT_SHORT = {"max_output_tokens": "length", "max_tokens": "length"}


class ResponsesDecoder(FrameDecoder):
    """Decodes one response. See `Decoder` for how to drive it.

    Every text and call is published once, whichever of the events that repeat it comes first: its deltas, its end, the
    end of its item, the final object. See `Spoken` for how they are told apart. A text in an item that only begins is
    not published: servers that send one send it again.
    """

    _keeps_text = True

    def __init__(self) -> None:
        super().__init__()
        self._spoken = Spoken()
        self._calls = OutputCalls(self._emit_tool_call)
        self._paragraph: object = None
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
            case "response.content_part.done" | "response.reasoning_summary_part.done":
                self._take_part(frame, _PART_EVENTS[kind])
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

    def _piece(self, frame: Mapping[str, Any]) -> Piece | None:
        name, _, step = str(frame.get("type")).rpartition(".")
        if step != "delta" or name not in _TEXT_EVENTS or not isinstance(frame.get("delta"), str):
            return None
        kind, of = _TEXT_EVENTS[name]
        return (kind, "delta") if self._spoken.goes_on(kind, frame, _part(of, frame)) else None

    def _catch_up(self) -> None:
        if self._alike is not None and self._alike.text:
            frame = self._alike.last_object()
            kind, of = _TEXT_EVENTS[frame["type"].removesuffix(".delta")]
            self._spoken.note(kind, self._alike.text.decode(), frame, _part(of, frame))
            self._alike.text.clear()

    def _take_text(self, kind: str, frame: Mapping[str, Any]) -> bool:
        name, _, step = kind.rpartition(".")
        if name not in _TEXT_EVENTS:
            return False
        kind, of = _TEXT_EVENTS[name]
        part = _part(of, frame)
        if step == "delta":
            text = frame.get("delta")
            if text and isinstance(text, str) and self._spoken.note(kind, text, frame, part):
                # Items are paragraphs, and so are the parts of a summary. Other parts' numbers may grow.
                self._say(kind, text, (frame.get("output_index"), part if of == "summary" else of))
        elif step == "done":
            self._say_unless_said(kind, _text(kind, frame), frame, part)
        return True

    def _take_part(self, frame: Mapping[str, Any], of: str) -> None:
        """A finished part. Few servers send nothing else."""
        if isinstance(part := frame.get("part"), dict):
            name = str(part.get("type"))
            if kind := REASONING if name in _REASONING_PARTS else _PART_KINDS.get(name):
                self._say_unless_said(kind, _text(kind, part), frame, _part(of, frame))

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
        elif kind in _TEXT_ITEMS and is_done:
            self._take_texts(item, where)
        elif kind in _TEXT_ITEMS:
            self._spoken.begin(where)

    def _take_texts(self, item: Mapping[str, Any], where: Mapping[str, Any]) -> None:
        """What a finished item says."""
        if item.get("type") == "reasoning":
            self._calls.take_reasoning(item)
        texts = _texts(item)
        said = {kind for kind, text in _by_kind(texts).items() if self._spoken.has_all(kind, text, where)}
        parts = Counter(kind for kind, *_ in texts)
        for kind, text, part, annotations in texts:
            if kind not in said:
                self._say_unless_said(kind, text, where, part, parts[kind])
            self._emit_annotations(annotations)

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
        items = _objects(output)
        self._spoken.settle([(item.get("id"), _by_kind(_texts(item))) for item in items])
        self._calls.settle(items)
        for index, item in enumerate(items):
            is_call = item.get("type") in _CALL_ITEMS
            self._take_item(item, {} if is_call else {"output_index": index}, is_done=True)

    def _reason(self, kind: str, response: Mapping[str, Any]) -> str:
        if kind == "response.incomplete":
            details = response.get("incomplete_details")
            reason = details.get("reason") if isinstance(details, dict) else None
            return _CUT_SHORT.get(reason, reason) if isinstance(reason, str) else "length"
        return "tool_calls" if self._calls else "stop"

    def _say(self, kind: str, text: str, paragraph: object) -> None:
        if kind == REASONING:
            if self._paragraph not in (None, paragraph):
                self._emit(REASONING, "\n\n")
            self._paragraph = paragraph
        self._emit(kind, text)

    def _say_unless_said(
        self, kind: str, text: str, where: Mapping[str, Any], part: Part, parts: int | None = None
    ) -> None:
        if text and (rest := self._spoken.rest(kind, text, where, part, parts)):
            self._say(kind, rest, object() if rest == text else self._paragraph)


def _part(of: str, frame: Mapping[str, Any]) -> Part:
    number = frame.get(f"{of}_index")
    return of, number if isinstance(number, int) else None


def _texts(item: Mapping[str, Any]) -> list[tuple[str, str, Part, Any]]:
    """What a message or a piece of reasoning says: kind, text, part and sources of each."""
    # Providers that show their reasoning repeat it as a summary.
    of = "content" if item.get("content") else "summary"
    return [
        (kind, _text(kind, part), (of, number), part.get("annotations"))
        for number, part in enumerate(_objects(item.get(of)))
        if (kind := REASONING if item.get("type") == "reasoning" else _PART_KINDS.get(str(part.get("type"))))
    ]


def _by_kind(texts: list[tuple[str, str, Part, Any]]) -> dict[str, str]:
    return {kind: "".join(text for other, text, *_ in texts if other == kind) for kind in {kind for kind, *_ in texts}}


def _text(kind: str, holder: Mapping[str, Any]) -> str:
    """The whole text of an event or a part; "" if it has none."""
    text = holder.get("refusal" if kind == REFUSAL else "text")
    return text if isinstance(text, str) else ""


def _objects(values: Any) -> list[dict[str, Any]]:
    """A list's objects, each at its place."""
    return [value if isinstance(value, dict) else {} for value in values] if isinstance(values, list) else []


def _is_error(frame: Mapping[str, Any], event: SseEvent) -> bool:
    if "type" in frame and not frame.get("error"):
        return False
    return bool(frame.get("error") or frame.get("code")) or event.event == b"error" or (event.status or 0) >= 400
