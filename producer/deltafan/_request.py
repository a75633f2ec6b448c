"""A prompt job as its caller states it: checked at the door, and written as arq's job record."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from difflib import get_close_matches
from math import isfinite
from typing import Annotated, Any, Literal

import orjson
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)

from deltafan._errors import InvalidRequest
from deltafan._keys import FUNCTION
from deltafan._messages import conversation, held, with_conversation

_JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
Lane = Literal["interactive", "batch"]
OnInterrupt = Literal["restart", "continue", "fail"]
Api = Literal["chat", "responses", "dashscope"]

Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]

_PLACES = {"chat": "messages", "responses": "input", "dashscope": "input.messages"}
"""Where each API's body holds the conversation."""

MAX_BODY_BYTES = 8 * 1024 * 1024
"""Images travel inside the body as base64; a body beyond this belongs into object storage, by URL."""


def _check_metadata(metadata: dict[str, str]) -> dict[str, str]:
    if len(metadata) > 16 or any(len(name) > 64 or len(value) > 512 for name, value in metadata.items()):
        raise ValueError("at most 16 entries, names up to 64 and values up to 512 characters")
    if not all(_is_utf8(text) for text in (*metadata, *metadata.values())):
        raise ValueError("can not be written as UTF-8")
    return metadata


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_number(deadline: object) -> object:
    if isinstance(deadline, (int, float)):
        raise ValueError("a number is no moment; pass a timedelta from now, or an aware datetime")
    return deadline


class Timeouts(BaseModel):
    """Limits in seconds on one job's model calls; what is left out is as for the model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    connect_s: Seconds | None = None
    first_delta_s: Seconds | None = None
    silence_s: Seconds | None = None
    total_s: Seconds | None = None


class JobRequest(BaseModel):
    """One prompt to generate. Also the keyword arguments of the arq function, so any arq producer can write it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Annotated[str, Field(min_length=1, max_length=256)]
    """A model of the catalogue, or `provider/model`."""
    api: Api = "chat"
    """The upstream API whose native request `body` is."""
    body: dict[str, Any] = Field(default_factory=dict, repr=False)
    """The native request body, passed through; the worker sets model, streaming and usage itself."""
    lane: Lane = "interactive"
    tenant: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    metadata: Annotated[dict[str, str], AfterValidator(_check_metadata)] = Field(default_factory=dict)
    """For operators: it stands in arq's record of the job while that waits or runs, and is shown nowhere else."""
    deadline: Annotated[AwareDatetime, BeforeValidator(_no_number)] | None = None
    """After this moment the job fails with `deadline_exceeded`, wherever it is."""
    on_interrupt: OnInterrupt = "restart"
    """What happens when an answer breaks off in the middle: generate it again from the start, go on where it broke
    off (where the provider can; else from the start), or fail."""
    timeouts: Timeouts | None = None
    """Instead of the model's own."""
    max_output_bytes: Annotated[int, Field(ge=1, strict=True)] | None = None
    """An answer longer than this ends with `output_too_long`; the worker's own limit holds as well."""
    parent: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None
    """The job whose tool calls this one answers."""
    ttl: Annotated[timedelta, Field(gt=timedelta(0), le=timedelta(days=30))] | None = None
    """How long the result is kept after the end, and its stream at most; None: as the server is configured."""
    submitted_at_ms: int | None = None
    """Unix time of the submit; set by the producer."""

    @property
    def deadline_ms(self) -> int | None:
        """The deadline as unix time in ms."""
        return None if self.deadline is None else int(self.deadline.timestamp() * 1000)


_validate = TypeAdapter(JobRequest).validator.validate_python
"""JobRequest.model_validate without its way there, a quarter of the time: see the bulk submit in bench/."""


def parse_request(fields: Mapping[str, Any], *, max_body_bytes: int = MAX_BODY_BYTES) -> JobRequest:
    """Check a request.

    Raises:
        InvalidRequest: which field is wrong and why; nothing has been sent.
    """
    return parse_and_dump(fields, max_body_bytes=max_body_bytes)[0]


def parse_and_dump(fields: Mapping[str, Any], *, max_body_bytes: int = MAX_BODY_BYTES) -> tuple[JobRequest, bytes]:
    """Check a request. With it comes the JSON of its model, api and body, of which `digest` is made.

    Raises:
        InvalidRequest: as `parse_request`.
    """
    if isinstance(fields.get("deadline"), datetime) and fields["deadline"].tzinfo is None:
        raise InvalidRequest("deadline", "has no time zone; use datetime.now(UTC) + … or an aware datetime")
    try:
        request: JobRequest = _validate(_messages_into_body(fields))
    except ValidationError as error:
        raise _explain(error) from None
    _check_body(request)
    data = _dump(request)
    if len(data) > max_body_bytes and (size_bytes := len(orjson.dumps(request.body))) > max_body_bytes:
        raise InvalidRequest(
            "body", f"is {size_bytes} bytes long, the limit is {max_body_bytes}; pass large media by URL"
        )
    return request, data


def digest(data: bytes) -> str:
    """What makes two submits under one id the same job: model, api and body, however their keys are ordered."""
    return hashlib.sha256(data).hexdigest()[:32]


def check_request(*, max_body_bytes: int | None = None, **fields: Any) -> None:
    """Check the arguments of a submit without submitting: nothing is sent. Without a limit a producer's default holds.

    Raises:
        InvalidRequest: which one is wrong and why.
    """
    request = parse_request(fields, max_body_bytes=max_body_bytes or MAX_BODY_BYTES)
    job_record(request, now_ms=0)


def check_job_id(job_id: str, field: str = "job_id") -> str:
    """Give a usable id back.

    Raises:
        InvalidRequest: it has characters that a key can not hold, or is too long.
    """
    if not isinstance(job_id, str) or _JOB_ID.fullmatch(job_id) is None:
        raise InvalidRequest(field, f"{str(job_id)[:80]!r} is not 1 to 64 of A-Z, a-z, 0-9, _ and -")
    return job_id


def check_reason(reason: str) -> str:
    """Give the reason of a cancel back, cut to 512 characters.

    Raises:
        InvalidRequest: it is no text, or has halves of characters that can not be stored.
    """
    if not isinstance(reason, str) or not _is_utf8(reason):
        raise InvalidRequest("reason", "a text is needed that can be written as UTF-8")
    return reason[:512]


def job_record(request: JobRequest, *, now_ms: int) -> bytes:
    """The job as arq stores it, in JSON: any arq worker with a JSON deserializer can run it.

    Raises:
        InvalidRequest: the body is nested so deeply that it can be written alone, but not inside a record.
    """
    arguments = {**inherited(request), "submitted_at_ms": now_ms}
    if request.deadline is not None:
        arguments["deadline"] = request.deadline
    if request.parent is not None:
        arguments["parent"] = request.parent
    return _write({"t": None, "f": FUNCTION, "a": [], "k": arguments, "et": now_ms})


def inherited(request: JobRequest) -> dict[str, Any]:
    """What the next turn of a conversation takes from this one: all but its moment and its place."""
    # Written out because it is on the path of bulk submits, where pydantic's model_dump would take the most time.
    arguments: dict[str, Any] = {
        "model": request.model,
        "api": request.api,
        "body": request.body,
        "lane": request.lane,
        "on_interrupt": request.on_interrupt,
    }
    if request.tenant is not None:
        arguments["tenant"] = request.tenant
    if request.metadata:
        arguments["metadata"] = request.metadata
    if request.timeouts is not None:
        arguments["timeouts"] = request.timeouts.model_dump(exclude_none=True)
    if request.max_output_bytes is not None:
        arguments["max_output_bytes"] = request.max_output_bytes
    if request.ttl is not None:
        arguments["ttl"] = request.ttl.total_seconds()
    return arguments


# No validators of the model: pydantic's way to a Python function and back would take as long as the function.
def _messages_into_body(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    if fields.get("messages") is None:
        return fields
    fields = dict(fields)
    messages, body, api = fields.pop("messages"), fields.get("body"), fields.get("api", "chat")
    body = {} if body is None else body
    if not isinstance(body, Mapping) or not isinstance(messages, (list, tuple)):
        return {**fields, "body": body}  # which of the two is wrong is said by other checks
    if held(api, body) is not None:
        raise InvalidRequest("messages", "given twice, also inside body")
    fields["body"] = with_conversation(api, body, messages)
    return fields


def _check_body(request: JobRequest) -> None:
    api, body = request.api, request.body
    if api != "responses" or not {"prompt", "conversation", "previous_response_id"} & body.keys():
        _check_messages(api, conversation(api, body))
    if body.get("model", request.model) != request.model:
        raise InvalidRequest("body.model", "differs from model; leave it out")
    parameters = body.get("parameters") if api == "dashscope" else body
    if isinstance(parameters, dict) and parameters.get("n") not in (None, 1):
        raise InvalidRequest("body.n", "one job is one generation; submit n jobs for n answers")


def _check_messages(api: Api, messages: Sequence[Any]) -> None:
    if not messages:
        where = f"as messages= or as {_PLACES[api]} inside body"
        raise InvalidRequest("messages", f"a non-empty list is needed ({where})")
    for index, message in enumerate(messages):
        is_item = api == "responses" and isinstance(message, dict) and isinstance(message.get("type"), str)
        if not is_item and not (isinstance(message, dict) and isinstance(message.get("role"), str)):
            raise InvalidRequest(f"messages[{index}]", "an object with a role is needed")


def _dump(request: JobRequest) -> bytes:
    data = _write([request.model, request.api, request.body], orjson.OPT_SORT_KEYS)
    if b"null" in data and (where := _find_no_number(request.body, "body")):  # which is how it writes nan
        raise InvalidRequest(where, "is no number that JSON can hold")
    return data


def _write(value: object, option: int = 0) -> bytes:
    try:
        return orjson.dumps(value, option=option)
    except orjson.JSONEncodeError as error:
        raise InvalidRequest("body", f"can not be written as JSON ({error})") from None


def _find_no_number(value: Any, path: str) -> str | None:
    if isinstance(value, float):
        return None if isfinite(value) else path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return next(filter(None, (_find_no_number(part, f"{path}.{key}") for key, part in parts)), None)


def _explain(error: ValidationError) -> InvalidRequest:
    """The first error, in the caller's words."""
    first = error.errors(include_url=False, include_input=False)[0]
    field, kind = ".".join(str(part) for part in first["loc"]), first["type"]
    if kind == "extra_forbidden":
        options = [*JobRequest.model_fields, "messages", "job_id"]
        if field.startswith("timeouts."):
            options = [f"timeouts.{name}" for name in Timeouts.model_fields]
        near = get_close_matches(field, [name for name in options if name != "submitted_at_ms"], n=1)
        hint = f"did you mean {near[0]}?" if near else "parameters of the model belong into body"
        return InvalidRequest(field, f"is not an option; {hint}")
    if kind == "missing":
        return InvalidRequest(field, "is missing")
    why = str(first["msg"]).removeprefix("Value error, ")
    return InvalidRequest(field, why[:1].lower() + why[1:])
