"""Input rows: OpenAI's batch format or the short one, checked line by line."""

import gzip
import zlib
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


def read_rows(
    path: Path, *, model: str | None = None, max_body_bytes: int | None = None, name: str | None = None
) -> Iterator[Row]:
    """The rows of a JSON Lines file, `.gz` or not, each checked as a submit would check it.

    A line is OpenAI's (`custom_id`, `method`, `url`, `body`) or short: `prompt` or `messages`, with or without `model`
    and an id of its own. A row without an id goes by its line's number. `name` is what errors call the file.

    Raises:
        BadInput: the first line that can not be used, and why.
    """
    number, where = 0, name or str(path)
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise BadInput(where, number, f"is longer than {MAX_LINE_BYTES} bytes; pass large media by URL")
                if line.strip():
                    yield _row(line, number, where, model, max_body_bytes)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BadInput(where, number + 1, f"can not be unpacked ({error}); is the file whole?") from None


def _row(line: bytes, number: int, where: str, default_model: str | None, max_body_bytes: int | None) -> Row:
    try:
        data = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise BadInput(where, number, f"is not JSON ({error.msg} at character {error.pos + 1})") from None
    if not isinstance(data, dict):
        raise BadInput(where, number, "is not a JSON object")
    try:
        _know_all_keys(data)
        custom_id, api, model = _custom_id(data, number), _api(data), _model(data, default_model)
        body = _body(data, api)
        check_request(model=model, api=api, body=body, max_body_bytes=max_body_bytes)
    except InvalidRequest as error:
        raise BadInput(where, number, str(error)) from None
    return Row(number, custom_id, model, api, body)


def _know_all_keys(data: Mapping[str, Any]) -> None:
    if unknown := sorted(data.keys() - _KEYS):
        raise InvalidRequest(unknown[0], "is no field of a row; parameters of the model belong into body")


def _custom_id(data: Mapping[str, Any], number: int) -> str:
    custom_id = data.get("custom_id", data.get("id", f"line-{number}"))
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= 512:
        raise InvalidRequest("custom_id", "is not a text of 1 to 512 characters")
    return custom_id


def _api(data: Mapping[str, Any]) -> str:
    url = data.get("url", "/v1/chat/completions")
    if not isinstance(url, str) or url not in _APIS or data.get("method", "POST") != "POST":
        raise InvalidRequest("url", f"only POST to {' and '.join(_APIS)} can be batched")
    return _APIS[url]


def _model(data: Mapping[str, Any], default: str | None) -> str:
    body = data.get("body", {})
    if not isinstance(body, dict):
        raise InvalidRequest("body", "is not an object")
    given = {str(model) for model in (data.get("model"), body.get("model")) if model}
    if len(given) > 1:
        raise InvalidRequest("model", f"is given twice, as {' and '.join(sorted(given))}")
    model = data.get("model") or body.get("model") or default
    if not isinstance(model, str):
        raise InvalidRequest("model", "there is none; name one in its body, or for all rows with --model")
    return model


def _body(data: Mapping[str, Any], api: str) -> dict[str, Any]:
    body = {name: value for name, value in data.get("body", {}).items() if name != "model"}
    target = "messages" if api == "chat" else "input"
    given = [name for name in ("prompt", "messages") if name in data] + [target] * (target in body)
    if len(given) > 1:
        raise InvalidRequest(given[0], f"is given beside {given[1]}; only one of them can be sent")
    if "prompt" in data:
        if not isinstance(data["prompt"], str):
            raise InvalidRequest("prompt", "is not a text")
        body[target] = [{"role": "user", "content": data["prompt"]}]
    elif "messages" in data:
        body[target] = data["messages"]
    return body
