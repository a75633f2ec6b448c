"""The upstream APIs: how each wants to be asked for a stream, and which decoder reads it."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import orjson

from deltafan_worker._chat import ChatDecoder
from deltafan_worker._dashscope import DashScopeDecoder
from deltafan_worker._decoder import Decoder
from deltafan_worker._responses import ResponsesDecoder
from deltafan_worker._route import Route

_TEXT_PATH = "/services/aigc/text-generation/generation"
_MULTIMODAL_PATH = "/services/aigc/multimodal-generation/generation"
_MULTIMODAL = re.compile(r"-vl|vl-|omni|qvq|audio|qwen3\.[5-9]|qwen3\.8-max", re.IGNORECASE)
"""Names of models that live on the multimodal path, as far as names tell; a wrong guess costs one refused request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Api:
    """One upstream API."""

    paths: Callable[[str], tuple[str, ...]]
    """Where a model may be: appended to the provider's base URL, the likely one first."""
    body: Callable[[Route, Mapping[str, Any]], dict[str, Any]]
    """The request as it is sent: the caller's body, streaming and usage forced."""
    decoder: Callable[[str], Decoder]
    """A decoder for an answer of this model."""
    headers: Mapping[str, str] = field(default_factory=dict)


def _chat_body(route: Route, body: Mapping[str, Any]) -> dict[str, Any]:
    options = body.get("stream_options")
    options = {**(options if isinstance(options, dict) else {}), "include_usage": True}
    return {**route.defaults, **body, "model": route.model, "stream": True, "stream_options": options}


def continued(route: Route, body: Mapping[str, Any], said: str) -> dict[str, Any]:
    """The body that asks for the rest of an answer of which `said` is there."""
    message: dict[str, Any] = {"role": "assistant", "content": said}
    options: dict[str, Any] = {}
    match route.continuation:
        case "partial":
            message["partial"] = True
        case "prefix":
            message["prefix"] = True
        case "continue_final_message":
            options = {"continue_final_message": True, "add_generation_prompt": False}
    return {**body, **options, "messages": [*body["messages"], message]}


def _responses_body(route: Route, body: Mapping[str, Any]) -> dict[str, Any]:
    kept = {"background": True, "store": True} if route.in_background else {}
    return {**route.defaults, **body, **kept, "model": route.model, "stream": True}


def _dashscope_body(route: Route, body: Mapping[str, Any]) -> dict[str, Any]:
    given = body.get("parameters")
    parameters = {"result_format": "message", **route.defaults, **(given if isinstance(given, dict) else {})}
    prompt = body.get("input")
    if isinstance(prompt, dict) and isinstance(prompt.get("messages"), list):
        shape = _as_parts if route.url.endswith(_MULTIMODAL_PATH) else _as_text
        prompt = {**prompt, "messages": [shape(message) for message in prompt["messages"]]}
    # Increments are sent as they are; without this, each frame of most models repeats the whole answer.
    return {**body, "model": route.model, "input": prompt, "parameters": {**parameters, "incremental_output": True}}


def _as_parts(message: Any) -> Any:
    """The multimodal path takes content as a list of parts only."""
    if isinstance(message, dict) and isinstance(content := message.get("content"), str):
        return {**message, "content": [{"text": content}] if content else []}
    return message


def _as_text(message: Any) -> Any:
    """The text path takes content as a string only."""
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list) and all(isinstance(part, dict) and part.keys() == {"text"} for part in content):
        return {**message, "content": "".join(str(part["text"]) for part in content)}
    return message


def _dashscope_paths(model: str) -> tuple[str, ...]:
    paths = (_TEXT_PATH, _MULTIMODAL_PATH)
    return paths[::-1] if _MULTIMODAL.search(model) else paths


APIS: Mapping[str, Api] = {
    "chat": Api(paths=lambda _model: ("/chat/completions",), body=_chat_body, decoder=lambda _model: ChatDecoder()),
    "responses": Api(
        paths=lambda _model: ("/responses",), body=_responses_body, decoder=lambda _model: ResponsesDecoder()
    ),
    "dashscope": Api(
        paths=_dashscope_paths,
        body=_dashscope_body,
        decoder=DashScopeDecoder,
        headers={"X-DashScope-SSE": "enable"},
    ),
}


@dataclass(frozen=True, slots=True)
class HttpCall:
    """A request as it is sent."""

    method: str
    url: str
    headers: Mapping[str, str] = field(repr=False)
    data: bytes | None = field(default=None, repr=False)


def generating(route: Route, body: Mapping[str, Any]) -> HttpCall:
    """The call that begins an answer."""
    data = orjson.dumps(APIS[route.api].body(route, body))
    # Copied: it stays as long as the answer lasts, and orjson's own bytes keep the 4 KiB that they were written in.
    return HttpCall("POST", route.url, _headers(route), bytes(memoryview(data)))


def listening(route: Route, response_id: str, after: int) -> HttpCall:
    """The call for a background response's events after number `after`."""
    return HttpCall("GET", f"{route.url}/{quote(response_id)}?stream=true&starting_after={after}", _headers(route))


def ending(route: Route, response_id: str) -> HttpCall:
    """The call that ends a background response."""
    return HttpCall("POST", f"{route.url}/{quote(response_id)}/cancel", _headers(route))


def _headers(route: Route) -> dict[str, str]:
    """What the API asks for, under the provider's own."""
    api = APIS[route.api]
    return {"Content-Type": "application/json", "Accept": "text/event-stream", **api.headers, **route.headers}
