"""Errors of a model provider: every form they come in, and whether trying again may help."""

import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import orjson

MAX_MESSAGE_CHARS = 1000

_RETRYABLE_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_PERMANENT_CODES = frozenset(
    {
        "arrearage",
        "commoditynotpurchased",
        "prepaidbilloverdue",
        "postpaidbilloverdue",
        "data_inspection_failed",
        "datainspectionfailed",
        "invalid_api_key",
        "invalidapikey",
        "invalid_prompt",
        "invalid_request_error",
        "invalid_parameter_error",
        "invalidparameter",
        "model_not_found",
        "modelnotfound",
        "access_denied",
        "content_filter",
    }
)
_RETRYABLE_CODES = frozenset(
    {
        "rate_limit_exceeded",
        "server_error",
        "internal_error",
        "internalerror",
        "limit_requests",
        "limit_burst_rate",
        "overloaded_error",
        "requesttimeout",
        "serviceunavailable",
        "modelunavailable",
        "modelservicefailed",
        "systemerror",
    }
)
# `insufficient_quota` is the end of the money at OpenAI and a limit per minute at DashScope; only the words tell.
_EXHAUSTED = re.compile(
    r"exhausted|exceeded your current quota|month|billing|plan and billing|free tier|token-plan", re.IGNORECASE
)
# What a request gets anywhere: no other provider would take it either. All other refusals are one account's own.
_REFUSED_EVERYWHERE = frozenset(
    {
        "data_inspection_failed",
        "datainspectionfailed",
        "invalid_prompt",
        "invalid_request_error",
        "invalid_parameter_error",
        "invalidparameter",
        "content_filter",
    }
)
# Of the account, not of the request; insufficient_quota only where its message made it permanent.
_ACCOUNT_CODES = frozenset(
    {
        "arrearage",
        "prepaidbilloverdue",
        "postpaidbilloverdue",
        "insufficient_quota",
        "throttling.allocationquota",
    }
)
_CONNECTION_CODES = frozenset(
    {"truncated", "connection_lost", "connect_failed", "connect_timeout", "silence_timeout", "first_delta_timeout"}
    | {f"http_{status}" for status in (500, 502, 503, 504, 429)}
)
_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d+)?)s)?(?:(\d+(?:\.\d+)?)ms)?")
_STATUS_IN_TEXT = re.compile(r"HTTP_STATUS/(\d{3})")


class UpstreamError(Exception):
    """A model call failed. `code` is the provider's where it gave one, else ours."""

    def __init__(
        self,
        *,
        code: str,
        message: str,
        retryable: bool,
        status: int | None = None,
        retry_after_s: float | None = None,
        request_id: str | None = None,
        at_once: bool = False,
    ) -> None:
        self.code = code
        self.message = message[:MAX_MESSAGE_CHARS]
        self.retryable = retryable
        self.status = status
        self.retry_after_s = retry_after_s
        self.request_id = request_id
        self.at_once = at_once
        """Whether the first retry need not wait: nothing says that the provider has too much to do."""
        super().__init__(self.message)

    @property
    def is_rate_limit(self) -> bool:
        """Whether the provider asks for less, of this fleet as a whole."""
        limited = self.status == 429 or self.code.lower().startswith(("throttling", "limit_", "rate_limit"))
        return limited and self.retryable

    @property
    def is_exhausted(self) -> bool:
        """Whether the account has no money or quota left, so that no request of it helps."""
        return not self.retryable and (self.status == 402 or self.code.lower() in _ACCOUNT_CODES)

    @property
    def is_refused_everywhere(self) -> bool:
        """Whether the request itself is at fault, so that no other provider need be asked."""
        if self.retryable:
            return False
        return self.code.lower() in _REFUSED_EVERYWHERE or (
            self.status in (400, 413, 422) and self.code.lower() not in _PERMANENT_CODES
        )

    @property
    def may_be_found_again(self) -> bool:
        """Whether only the connection is gone, not the response that was read over it."""
        return self.retryable and self.code in _CONNECTION_CODES

    @property
    def is_wrong_path(self) -> bool:
        """Whether the model lives on the other one of DashScope's two paths."""
        return "url error" in self.message.lower()

    def __repr__(self) -> str:
        # Without the message: providers quote the prompt in it.
        return f"UpstreamError(code={self.code!r}, status={self.status}, retryable={self.retryable})"

    def __str__(self) -> str:
        return f"{self.code} (HTTP {self.status})" if self.status else self.code


def from_response(status: int, headers: Mapping[str, str], body: bytes, *, now_s: float = 0.0) -> UpstreamError:
    """The error of a response that is not a 200. `now_s` (unix time) is what a Retry-After date counts from."""
    lowered = {name.lower(): value for name, value in headers.items()}
    payload = _payload_of(body)
    code, message, request_id = _read(payload)
    return UpstreamError(
        code=code or f"http_{status}",
        message=message or f"the provider answered HTTP {status}",
        retryable=_is_retryable(code, message, status, lowered.get("x-should-retry")),
        status=status,
        retry_after_s=_retry_after_s(lowered, now_s),
        request_id=request_id or lowered.get("x-request-id"),
    )


def from_payload(payload: Mapping[str, Any], *, status: int | None = None) -> UpstreamError:
    """The error of a frame inside a 200."""
    code, message, request_id = _read(payload)
    error = payload.get("error")
    numbers = [
        status,
        error.get("status_code") if isinstance(error, dict) else None,
        error.get("code") if isinstance(error, dict) else None,
    ]
    known = next((number for number in numbers if isinstance(number, int) and 400 <= number < 600), None)
    return UpstreamError(
        code=code or "stream_error",
        message=message or "the provider reported an error in mid-stream",
        retryable=_is_retryable(code, message, known, None),
        status=known,
        request_id=request_id,
    )


def from_error_text(text: str) -> UpstreamError:
    """The error that DashScope puts, as the text of a whole native frame, where output should stand."""
    match = _STATUS_IN_TEXT.search(text)
    return from_payload(_payload_of(text.encode()), status=int(match[1]) if match else None)


def too_long(max_bytes: int) -> UpstreamError:
    """The answer is longer than this job may have it."""
    message = (
        f"the answer is longer than {max_bytes} bytes, so it was cut; "
        "raise max_output_bytes of the job or of the worker, or bound the answer in the body"
    )
    return UpstreamError(code="output_too_long", message=message, retryable=False)


def _payload_of(body: bytes) -> Mapping[str, Any]:
    """A JSON object, bare or in the data lines of SSE; an empty one for HTML and other surprises."""
    data_lines = [line[5:] for line in body.splitlines() if line.startswith(b"data:")]
    for candidate in (body, *data_lines):
        try:
            payload = orjson.loads(candidate)
        except orjson.JSONDecodeError:
            continue
        if isinstance(payload, dict):
            return payload
    return {}


def _read(payload: Mapping[str, Any]) -> tuple[str | None, str, str | None]:
    """Code, message and request id of the nested and of the flat form."""
    error = payload.get("error")
    if isinstance(error, str):
        return _word(payload.get("code")), error, _word(payload.get("request_id"))
    inner = error if isinstance(error, dict) else payload
    code = _word(inner.get("code")) or _word(inner.get("type")) or _word(payload.get("code"))
    message = inner.get("message")
    request_id = payload.get("request_id") or payload.get("requestId")
    return code, message if isinstance(message, str) else "", _word(request_id)


def _word(value: Any) -> str | None:
    return value[:128] if isinstance(value, str) and value and value != "error" else None


def _is_retryable(code: str | None, message: str, status: int | None, should_retry: str | None) -> bool:
    if should_retry in ("true", "false"):
        return should_retry == "true"
    name = (code or "").lower()
    if name in ("insufficient_quota", "throttling.allocationquota"):
        return _EXHAUSTED.search(message) is None
    if name in _PERMANENT_CODES:
        return False
    if name in _RETRYABLE_CODES or name.startswith(("throttling", "internalerror")):
        return True
    if status is not None:
        return status in _RETRYABLE_STATUS or status >= 500
    # An unknown error in mid-stream: it had begun to work, so it may work again.
    return True


def _retry_after_s(headers: Mapping[str, str], now_s: float) -> float | None:
    if (milliseconds := _number(headers.get("retry-after-ms"))) is not None:
        return milliseconds / 1000
    value = headers.get("retry-after")
    if value is None:
        return _limit_reset_s(headers)
    if (seconds := _number(value)) is not None:
        return seconds
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now_s)
    except ValueError:
        return None


def _limit_reset_s(headers: Mapping[str, str]) -> float | None:
    """When the limit that is used up is full again, as OpenAI's headers tell; None when none of them says so."""
    waits = [
        _duration_s(headers.get(f"x-ratelimit-reset-{kind}"))
        for kind in ("requests", "tokens")
        if _number(headers.get(f"x-ratelimit-remaining-{kind}")) == 0
    ]
    return max((wait for wait in waits if wait is not None), default=None)


def _duration_s(text: str | None) -> float | None:
    """A duration as Go writes it: 12ms, 1m30.5s."""
    match = _DURATION.fullmatch(text.strip()) if text and text.strip() else None
    if match is None:
        return None
    hours, minutes, seconds, milliseconds = (float(part or 0) for part in match.groups())
    return hours * 3600 + minutes * 60 + seconds + milliseconds / 1000


def _number(value: str | None) -> float | None:
    try:
        number = float(value) if value is not None else -1.0
    except ValueError:
        return None
    return number if 0 <= number < float("inf") else None
