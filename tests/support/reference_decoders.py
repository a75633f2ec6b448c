"""Slow, independent references: each reads its whole input at once and is written from the rules, not from the code."""

import json
from typing import Any


def sse_events(data: bytes) -> list[tuple[str, str, int | None]]:
    """(event name, data, HTTP status) of each event, by the standard's rules and our divergences from them."""
    text = data.decode("latin-1")
    text = text.removeprefix("\u00ef\u00bb\u00bf")
    lines, current, index = [], "", 0
    while index < len(text):
        if text[index] == "\r":
            lines.append(current)
            current = ""
            index += 2 if text[index : index + 2] == "\r\n" else 1
        elif text[index] == "\n":
            lines.append(current)
            current = ""
            index += 1
        else:
            current += text[index]
            index += 1
    if current:
        lines.append(current)
    events: list[tuple[str, str, int | None]] = []
    name, status = "", None
    values: list[str] = []
    for line in [*lines, ""]:
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        is_next = field == "data" and value.startswith(("{", "[DONE]")) and "".join(values[-1:]).endswith("}")
        ends = line == "" or (":" in line and (is_next or (field in ("event", "id") and values)))
        if ends:
            joined = "\n".join(values)
            if joined.encode("latin-1").strip():
                events.append((name, joined, status))
            name, status, values = "", None, []
        if field == "data" and ":" in line:
            values.append(value)
        elif field == "event" and ":" in line:
            name = value
        elif field == "" and (comment := value.lstrip()).startswith("HTTP_STATUS/") and comment[12:15].isdigit():
            status = int(comment[12:15]) if len(comment) >= 15 else status
    return events


def chat_outcome(data: bytes) -> dict[str, Any]:
    """Texts, finish reason and usage of a well-formed Chat Completions stream, by concatenation."""
    kinds = {"reasoning": "", "content": "", "refusal": ""}
    tools: dict[int, dict[str, str]] = {}
    finish, usage = None, None
    for _, payload, _ in sse_events(data):
        if payload.startswith("[DONE]"):
            continue
        chunk = json.loads(payload.encode("latin-1").decode())
        usage = chunk.get("usage") or usage
        for choice in chunk.get("choices") or []:
            if choice.get("index") not in (0, None):
                continue
            part = choice.get("delta") or {}
            kinds["reasoning"] += part.get("reasoning_content") or part.get("reasoning") or ""
            kinds["content"] += part.get("content") or ""
            kinds["refusal"] += part.get("refusal") or ""
            for call in part.get("tool_calls") or []:
                tool = tools.setdefault(call["index"], {"id": "", "name": "", "arguments": ""})
                function = call.get("function") or {}
                tool["id"] = tool["id"] or call.get("id") or ""
                tool["name"] = tool["name"] or function.get("name") or ""
                tool["arguments"] += function.get("arguments") or ""
            finish = finish or choice.get("finish_reason")
    return {**kinds, "tools": [tools[i] for i in sorted(tools)], "finish": finish, "usage": usage}
