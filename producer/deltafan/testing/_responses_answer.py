"""How the Responses API streams an answer, in OpenAI's dialect and in DashScope's."""

import base64
from collections.abc import Generator, Iterator, Mapping
from typing import Any

from deltafan.testing._answer import Answer, Audio, Fault, Part, Reasoning, Refusal, Text, Tokens, ToolCall
from deltafan.testing._steps import Dialect, Step

Event = dict[str, Any]
INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}


def event(kind: str, **fields: Any) -> Event:
    """One event. Its sequence_number is added when it is written, unless `fields` say otherwise."""
    return {"type": kind, **fields}


def state(kind: str, status: str, **fields: Any) -> Event:
    """An event that carries the response as it now is. Id and model are added when it is written."""
    return event(f"response.{kind}", response={"status": status, **fields})


def usage_object(tokens: Tokens, dialect: Dialect = "openai") -> dict[str, Any]:
    """The usage as this API counts it."""
    counts = {"input_tokens": tokens.input, "output_tokens": tokens.output, "total_tokens": tokens.total}
    details: dict[str, Any] = {"cached_tokens": tokens.cached_input}
    reasoning = {"output_tokens_details": {"reasoning_tokens": tokens.reasoning}}
    if dialect == "openai":
        written = {"cache_write_tokens": tokens.cache_write} if tokens.cache_write else {}
        return {**counts, "input_tokens_details": {**details, **written}, **reasoning}
    written = {"cache_creation_input_tokens": tokens.cache_write} if tokens.cache_write else {}
    billed = {**counts, "x_billing_type": "response_api", "prompt_tokens_details": {**details, **written}}
    return {**counts, "input_tokens_details": details, **reasoning, "x_details": [billed]}


def fault_events(fault: Fault, dialect: Dialect) -> Iterator[Event]:
    """A failure in the middle: OpenAI tells it twice."""
    told = {"code": fault.code, "message": fault.message}
    if dialect == "openai":
        yield event("error", error={"type": fault.code, **told, "param": None})
    yield state("failed", "failed", error=told)


def ending(answer: Answer, output: list[Event], dialect: Dialect) -> Event:
    """The terminal event of an answer that came to its end."""
    usage = usage_object(answer.usage, dialect) if answer.usage else None
    if (reason := INCOMPLETE.get(answer.finish)) is not None:
        return state("incomplete", "incomplete", output=output, usage=usage, incomplete_details={"reason": reason})
    return state("completed", "completed", output=output, usage=usage)


def streamed(answer: Answer, *, dialect: Dialect, background: bool, summary: bool) -> Iterator[Step]:
    """The events of this answer, and what happens between them."""
    yield from opening(dialect, background=background)
    items = Items(dialect, summary=summary)
    for part in answer.parts:
        if isinstance(part, Fault):
            yield from fault_events(part, dialect)
            return
        if isinstance(part, Part):
            yield from items.part(part)
        else:
            yield part
    status = "incomplete" if answer.finish in INCOMPLETE else "completed"
    yield from items.finish(status)
    yield ending(answer, items.output, dialect)


def opening(dialect: Dialect = "openai", *, background: bool = False) -> Iterator[Event]:
    """What comes before the first item."""
    if background:
        yield state("created", "queued", background=True)
        yield state("queued", "queued", background=True)
    elif dialect == "dashscope":
        yield state("created", "queued", model="")
    else:
        yield state("created", "in_progress")
    yield state("in_progress", "in_progress", background=background)


class Items:
    """Opens, fills and closes output items, so that deltas of one kind share one."""

    def __init__(self, dialect: Dialect, *, summary: bool) -> None:
        self._dialect = dialect
        self._summary = summary
        self._open: _Message | _Reasoning | None = None
        self._audio_kinds: list[str] = []
        self.output: list[Event] = []

    def part(self, part: Part) -> Iterator[Event]:
        """The events that this part brings."""
        match part:
            case Reasoning(text):
                if not isinstance(self._open, _Reasoning):
                    yield from self._close()
                    self._open = _Reasoning(len(self.output), self._dialect, summary=self._summary)
                    yield from self._open.begin()
                yield from self._open.delta(text)
            case Text(text) | Refusal(text):
                if not isinstance(self._open, _Message):
                    yield from self._close()
                    self._open = _Message(len(self.output))
                    yield from self._open.begin()
                yield from self._open.delta("refusal" if isinstance(part, Refusal) else "output_text", text)
            case ToolCall():
                yield from self._close()
                yield from self._call(part)
            case Audio():
                yield from self._audio(part)

    def finish(self, status: str) -> Iterator[Event]:
        """What ends the last item, which has this status, and the sound."""
        yield from self._close(status)
        for kind in self._audio_kinds:
            yield event(f"response.{kind}.done")

    def _close(self, status: str = "completed") -> Iterator[Event]:
        if self._open is not None:
            item = yield from self._open.end(status)
            self.output.append(item)
            self._open = None

    def _call(self, call: ToolCall) -> Iterator[Event]:
        index, arguments = len(self.output), "".join(call.arguments)
        item = {"id": f"fc_{index + 1}", "type": "function_call", "call_id": call.id, "name": call.name}
        place = {"item_id": item["id"], "output_index": index}
        yield event(
            "response.output_item.added", output_index=index, item={**item, "arguments": "", "status": "in_progress"}
        )
        # DashScope documents no events for the arguments: they come with the finished item.
        if self._dialect == "openai":
            for fragment in call.arguments:
                yield event("response.function_call_arguments.delta", **place, delta=fragment)
            yield event("response.function_call_arguments.done", **place, arguments=arguments)
        done = {**item, "arguments": arguments, "status": "completed"}
        yield event("response.output_item.done", output_index=index, item=done)
        self.output.append(done)

    def _audio(self, audio: Audio) -> Iterator[Event]:
        deltas = {"audio.transcript": audio.transcript, "audio": base64.b64encode(audio.pcm).decode()}
        for kind, delta in deltas.items():
            if delta:
                yield event(f"response.{kind}.delta", delta=delta)
                if kind not in self._audio_kinds:
                    self._audio_kinds.append(kind)


class _Message:
    """A message item: text, a refusal, or first the one and then the other, each a content part."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._item = {"id": f"msg_{index + 1}", "type": "message", "role": "assistant"}
        self._kinds: list[str] = []
        self._texts: list[str] = []

    def begin(self) -> Iterator[Event]:
        item = {**self._item, "status": "in_progress", "content": []}
        yield event("response.output_item.added", output_index=self._index, item=item)

    def delta(self, kind: str, text: str) -> Iterator[Event]:
        if self._kinds[-1:] != [kind]:
            yield from self._end_part()
            self._kinds.append(kind)
            self._texts.append("")
            yield event("response.content_part.added", **self._place(), part=self._part(kind, ""))
        self._texts[-1] += text
        logprobs: Event = {"logprobs": []} if kind == "output_text" else {}
        yield event(f"response.{kind}.delta", **self._place(), delta=text, **logprobs)

    def end(self, status: str) -> Generator[Event, None, Event]:
        yield from self._end_part()
        content = [self._part(kind, text) for kind, text in zip(self._kinds, self._texts, strict=True)]
        item = {**self._item, "status": status, "content": content}
        yield event("response.output_item.done", output_index=self._index, item=item)
        return item

    def _end_part(self) -> Iterator[Event]:
        if self._kinds:
            kind, text = self._kinds[-1], self._texts[-1]
            said: Mapping[str, Any] = {"refusal": text} if kind == "refusal" else {"text": text, "logprobs": []}
            yield event(f"response.{kind}.done", **self._place(), **said)
            yield event("response.content_part.done", **self._place(), part=self._part(kind, text))

    def _place(self) -> Event:
        return {"item_id": self._item["id"], "output_index": self._index, "content_index": len(self._kinds) - 1}

    def _part(self, kind: str, text: str) -> Event:
        if kind == "refusal":
            return {"type": "refusal", "refusal": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


class _Reasoning:
    """A reasoning item: its summary as OpenAI shows it, or its raw text as others do."""

    def __init__(self, index: int, dialect: Dialect, *, summary: bool) -> None:
        self._index = index
        self._dialect = dialect
        self._summary = summary and dialect == "openai"
        prefix = "rs" if dialect == "openai" else "msg"
        self._item = {"id": f"{prefix}_{index + 1}", "type": "reasoning"}
        self._place: Event = {"item_id": self._item["id"], "output_index": index}
        self._text = ""
        if self._summary:
            self._place["summary_index"] = 0
            self._kind, self._part_kind, self._part_type = "reasoning_summary_text", "reasoning_summary_part", "summary"
        else:
            self._kind, self._part_kind, self._part_type = "reasoning_text", "content_part", "reasoning"
            if dialect == "openai":
                self._place["content_index"] = 0

    def begin(self) -> Iterator[Event]:
        yield event("response.output_item.added", output_index=self._index, item={**self._item, "summary": []})
        # DashScope's raw text has no part around it.
        if self._dialect == "openai":
            yield event(f"response.{self._part_kind}.added", **self._place, part=self._part(""))

    def delta(self, text: str) -> Iterator[Event]:
        self._text += text
        yield event(f"response.{self._kind}.delta", **self._place, delta=text)

    def end(self, status: str) -> Generator[Event, None, Event]:
        yield event(f"response.{self._kind}.done", **self._place, text=self._text)
        if self._dialect == "openai":
            yield event(f"response.{self._part_kind}.done", **self._place, part=self._part(self._text))
        summarised = self._summary or self._dialect == "dashscope"
        summary = [{"type": "summary_text", "text": self._text}] if summarised else []
        item: Event = {**self._item, "summary": summary}
        if not summarised:
            item |= {"content": [self._part(self._text)], "status": status}
        yield event("response.output_item.done", output_index=self._index, item=item)
        return item

    def _part(self, text: str) -> Event:
        return {"type": f"{self._part_type}_text", "text": text}
