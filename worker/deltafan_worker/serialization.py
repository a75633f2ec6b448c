"""JSON in place of arq's pickle: whoever can write to Redis must not be able to run code in a worker.

Exceptions cross as their kind and message. A cancelled job comes back as asyncio.CancelledError, which is how
`arq.jobs.Job.abort()` knows that it has worked; every other one as JobExecutionFailed.
"""

import asyncio
from typing import Any

import orjson
from arq.worker import JobExecutionFailed

_ERROR = "$error"


def serialize(data: dict[str, Any]) -> bytes:
    """Give this to arq as `job_serializer`. A result's record leaves the job's arguments out, hence the prompt."""
    if "r" in data:
        data = {**data, "a": [], "k": {}}
    return orjson.dumps(data, default=_encode)


def deserialize(data: bytes) -> dict[str, Any]:
    """Give this to arq as `job_deserializer`.

    Raises:
        ValueError: not a JSON object.
    """
    fields = orjson.loads(data)
    if not isinstance(fields, dict):
        raise ValueError("an arq record is a JSON object")
    if "k" in fields:
        fields["k"] = {name: _quiet(value) for name, value in fields["k"].items()}
    result = fields.get("r")
    if isinstance(result, dict) and _ERROR in result:
        message = str(result.get("message", ""))
        fields["r"] = asyncio.CancelledError() if result[_ERROR] == "CancelledError" else JobExecutionFailed(message)
    return fields


class _QuietDict(dict[str, Any]):
    """A stock worker logs the repr of a job's arguments; this one's tells nothing of a prompt."""

    def __repr__(self) -> str:
        return "{…}"


class _QuietList(list[Any]):
    """As _QuietDict."""

    def __repr__(self) -> str:
        return "[…]"


def _quiet(value: Any) -> Any:
    if isinstance(value, dict):
        return _QuietDict(value)
    return _QuietList(value) if isinstance(value, list) else value


def _encode(value: object) -> Any:
    if isinstance(value, BaseException):
        return {_ERROR: type(value).__name__, "message": str(value)}
    raise TypeError(f"{type(value).__name__} can not be written as JSON")
