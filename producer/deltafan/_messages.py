"""The next turn of a conversation: what of a generation, and of its tools' results, goes back to the model.

Each API has its own form for it, and each model its own wish about reasoning: most ignore it, some refuse it, some
answer 400 without it. The rules are those of the providers' documentation as of November 2026.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import orjson

from deltafan._errors import InvalidRequest

if TYPE_CHECKING:
    from deltafan._fold import Generation, ToolCall

_WANTS_REASONING = re.compile(r"qwen3\.8-(max|flash|omni-flash)|kimi", re.IGNORECASE)
"""Models that think on from their own reasoning: every assistant message carries all of it."""
_WANTS_REASONING_WITH_TOOLS = re.compile(r"deepseek", re.IGNORECASE)
"""In thinking mode, once a tool has been called, even an empty one must come back."""


def to_messages(generation: "Generation", *, reasoning: bool | None = None) -> list[dict[str, Any]]:
    """See `Generation.to_messages`."""
    wanted = _wants_reasoning(generation) if reasoning is None else reasoning
    if generation.api == "responses":
        return _to_items(generation, reasoning=wanted)
    message: dict[str, Any] = {"role": "assistant", "content": generation.content}
    if wanted:
        message["reasoning_content"] = generation.reasoning
    if generation.refusal and generation.api != "dashscope":
        message["refusal"] = generation.refusal
    if generation.tool_calls:
        message["tool_calls"] = [_call(call) for call in generation.tool_calls]
        if generation.api == "dashscope":
            message["tool_calls"] = [{"index": index, **call} for index, call in enumerate(message["tool_calls"])]
    return [message]


def tool_messages(api: str, results: Mapping[str, str]) -> list[dict[str, Any]]:
    """The answers to tool calls, by call id, in the API's form."""
    if api == "responses":
        return [{"type": "function_call_output", "call_id": id_, "output": text} for id_, text in results.items()]
    return [{"role": "tool", "tool_call_id": id_, "content": text} for id_, text in results.items()]


def held(api: str, body: Mapping[str, Any]) -> Any:
    """Whatever stands where a request body has its messages (or items); None for nothing."""
    if api == "dashscope":
        given = body.get("input")
        return given.get("messages") if isinstance(given, Mapping) else None
    return body.get("input" if api == "responses" else "messages")


def conversation(api: str, body: Mapping[str, Any]) -> list[Any]:
    """The messages (or items) that a request body holds."""
    found = held(api, body)
    if api == "responses" and isinstance(found, str):
        return [{"role": "user", "content": found}]
    return list(found) if isinstance(found, (list, tuple)) else []


def with_conversation(api: str, body: Mapping[str, Any], messages: Sequence[Any]) -> dict[str, Any]:
    """The body with its messages (or items) replaced."""
    if api == "responses":
        return {**body, "input": list(messages)}
    if api == "dashscope":
        given = body.get("input")
        return {**body, "input": {**(given if isinstance(given, Mapping) else {}), "messages": list(messages)}}
    return {**body, "messages": list(messages)}


def declares_tools(api: str, body: Mapping[str, Any]) -> bool:
    """Whether an answer to this body may be tool calls."""
    return bool(_options(api, body).get("tools"))


def next_turn(
    api: str, body: Mapping[str, Any], generation: "Generation", results: Mapping[str, Any], changes: Mapping[str, Any]
) -> dict[str, Any]:
    """The body that answers a generation's tool calls: all that was said, the calls, their results.

    Where the provider keeps the conversation, only the results. `changes` go over the body. A `tool_choice` that forces
    a call is dropped, or the model would call for ever.

    Raises:
        InvalidRequest: there is nothing to answer, or the results do not match the calls.
    """
    calls = [call.id for call in generation.tool_calls]
    if not calls:
        raise InvalidRequest("job", f"{generation.status} without calling a tool; there is nothing to answer")
    if missing := [call for call in calls if call not in results]:
        raise InvalidRequest("results", f"there is none for call {missing[0]}; each call needs one")
    if unknown := [call for call in results if call not in calls]:
        raise InvalidRequest("results", f"{unknown[0]!r} is no call of this job; its calls are {', '.join(calls)}")
    texts = {call: _as_text(results[call]) for call in calls}
    answers = tool_messages(api, texts)
    turn = _kept_there(body, generation, answers) if api == "responses" else None
    if turn is None:
        said = generation.to_messages(reasoning=_asked_for_reasoning(api, body))
        turn = with_conversation(api, body, [*conversation(api, body), *_paired(said, answers)])
    if _options(api, turn).get("tool_choice") not in (None, "auto", "none"):
        if api == "dashscope":
            turn["parameters"] = {name: value for name, value in turn["parameters"].items() if name != "tool_choice"}
        else:
            del turn["tool_choice"]
    return {**turn, **changes}


def _kept_there(
    body: Mapping[str, Any], generation: "Generation", answers: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """The next body of a conversation that the provider keeps itself, and would hold twice if it were sent again."""
    if body.get("conversation"):
        return {**body, "input": list(answers)}
    answered = generation.usage.response_id if generation.usage else None
    if body.get("previous_response_id") and answered and body.get("store") is not False:
        return {**body, "previous_response_id": answered, "input": list(answers)}
    return None


def _paired(said: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Messages, then the answers; but each answer right behind its call where calls are items of their own."""
    by_call = {answer["call_id"]: answer for answer in answers if "call_id" in answer}
    paired: list[Mapping[str, Any]] = []
    for item in said:
        paired.append(item)
        if item.get("type") == "function_call":
            paired.append(by_call[item["call_id"]])
    return paired if by_call else [*said, *answers]


def _asked_for_reasoning(api: str, body: Mapping[str, Any]) -> bool | None:
    """What the request itself says about it; None when it does not."""
    options = _options(api, body)
    preserve, clear = options.get("preserve_thinking"), options.get("clear_thinking")
    if isinstance(preserve, bool):
        return preserve
    return not clear if isinstance(clear, bool) else None


def _options(api: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
    options = body.get("parameters") if api == "dashscope" else body
    return options if isinstance(options, Mapping) else {}


def _as_text(result: Any) -> str:
    return result if isinstance(result, str) else orjson.dumps(result).decode()


def _wants_reasoning(generation: "Generation") -> bool:
    names = f"{generation.provider}/{generation.model}"
    if generation.api == "dashscope":  # does not take it as input
        return False
    if _WANTS_REASONING.search(names):
        return bool(generation.reasoning)
    return bool(generation.tool_calls and _WANTS_REASONING_WITH_TOOLS.search(names))


def _call(call: "ToolCall") -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function, **(call.extra or {})}


def _to_items(generation: "Generation", *, reasoning: bool) -> list[dict[str, Any]]:
    """Input items without ids: with them the provider would ask for the reasoning items that belong to them.

    Reasoning that it sent encrypted, because the request asked for that, goes back as it came, before its call.
    """
    items: list[dict[str, Any]] = []
    if reasoning and generation.reasoning:
        thought = {"type": "reasoning_text", "text": generation.reasoning}
        items.append({"type": "reasoning", "summary": [], "content": [thought]})
    if text := generation.content or generation.refusal:
        items.append({"role": "assistant", "content": text})
    for call in generation.tool_calls:
        items += (call.extra or {}).get("reasoning", ())
        name_and_arguments = {"name": call.name, "arguments": call.arguments}
        items.append({"type": "function_call", "call_id": call.id, **name_and_arguments})
    return items
