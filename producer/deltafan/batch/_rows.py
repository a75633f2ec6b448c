"""Input rows: OpenAI's batch format or the short one, checked line by line."""

import gzip
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from deltafan import DeltafanError, InvalidRequest, check_request

_APIS = {"/v1/chat/completions": "chat", "/v1/responses": "responses"}
_KEYS = frozenset({"custom_id", "id", "method", "url", "body", "model", "prompt", "messages"})

MAX_LINE_BYTES = 16 * 1024 * 1024


class BadInput(DeltafanError, ValueError):
    """A line of a batch's files can not be used; nothing has been sent."""

    code = "bad_input"

    def __init__(self, where: str, line: int, why: str) -> None:
        self.line = line
        super().__init__(f"{where}, line {line}: {why}")


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt of a batch."""

    line: int
    custom_id: str
    model: str
    api: str
    body: Mapping[str, Any] = field(repr=False)


def read_rows(path: Path, *, model: str | None = None) -> Iterator[Row]:
    """The rows of a JSON Lines file, `.gz` or not, each checked as a submit would check it.

    A line is OpenAI's (`custom_id`, `method`, `url`, `body`) or short: `prompt` or `messages`, with or without `model`
    and an id of its own. A row without an id goes by its line's number.

    Raises:
        BadInput: the first line that can not be used, and why.
    """
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise BadInput(str(path), number, f"is longer than {MAX_LINE_BYTES} bytes; pass large media by URL")
            if line.strip():
                yield _row(line, number, str(path), model)


def _row(line: bytes, number: int, where: str, default_model: str | None) -> Row:
    try:
        data = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise BadInput(where, number, f"is not JSON ({error})") from None
    if not isinstance(data, dict):
        raise BadInput(where, number, "is not a JSON object")
    if unknown := sorted(data.keys() - _KEYS):
        raise BadInput(where, number, f"{unknown[0]} is no field of a row; parameters of the model belong into body")
    custom_id = data.get("custom_id", data.get("id", f"line-{number}"))
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= 512:
        raise BadInput(where, number, "custom_id: is not a text of 1 to 512 characters")
    api = _APIS.get(data.get("url", "/v1/chat/completions"))
    if api is None or data.get("method", "POST") != "POST":
        raise BadInput(where, number, f"url: only POST to {' and '.join(_APIS)} can be batched")
    body = data.get("body", {})
    if not isinstance(body, dict):
        raise BadInput(where, number, "body: is not an object")
    model = data.get("model") or body.get("model") or default_model
    if not isinstance(model, str):
        raise BadInput(where, number, "has no model; name one in its body, or for all rows with --model")
    messages = data.get("messages")
    if (prompt := data.get("prompt")) is not None:
        messages = [{"role": "user", "content": prompt}]
    body = {name: value for name, value in body.items() if name != "model"}
    if messages is not None:
        body["messages" if api == "chat" else "input"] = messages
    row = Row(number, custom_id, model, api, body)
    try:
        check_request(model=model, api=api, body=body)
    except InvalidRequest as error:
        raise BadInput(where, number, str(error)) from None
    return row
