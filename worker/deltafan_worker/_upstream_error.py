"""Errors of a model provider: every form they come in, and whether trying again may help."""

import re
from collections.abc import Iterable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import orjson

from deltafan_worker._plain import whole_characters

MAX_CODE_CHARS = 128
MAX_MESSAGE_CHARS = 1000
HIDDEN = "***"

_RETRYABLE_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
# All of them are looked for in a code in lower case, without underscores and blanks: each has two or three spellings.
_CONTENT = re.compile(r"datainspection|contentfilter|invalidprompt|policy|blocked|infringement")
"""What the request says is not wanted; it is not taken elsewhere."""
_ACCOUNT = re.compile(
    r"arrearage|overdue|billinghardlimit|purchased|invalidapikey|accessdenied|notfound|freetieronly|residency"
    r"|insufficientquota|allocationquota"
)
"""What this account may not, or has not."""
_REQUEST = re.compile(r"(^|\.)(invalid|badrequest)")
"""The request is wrong. Servers write it also where the account is at fault, or they are: then the status tells."""
_PASSING = re.compile(
    r"throttl|^limit|ratelimit|servererror|internalerror|systemerror|overloaded|timeout|unavailable|servicefailed"
)
_ACCOUNT_STATUS = frozenset({401, 402, 403, 404, 429})
_REQUEST_STATUS = frozenset({400, 413, 422})
# `insufficient_quota` is the end of the money at OpenAI and a limit per minute at DashScope; only the words tell.
_EXHAUSTED = re.compile(
    r"exhausted|exceeded your current quota|month|billing|plan and billing|free tier|token-plan", re.IGNORECASE
)
_FREE_TIER = re.compile(r"freetieronly$")
_MONEY = re.compile(
    rf"arrearage|billoverdue|billinghardlimit|^insufficientquota|^throttling\.allocationquota|{_FREE_TIER.pattern}"
)
"""The quotas only where their message made them permanent."""
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
        was_refused: bool = False,
    ) -> None:
        self._code = whole_characters(code)
        self._message = whole_characters(message)
        self.retryable = retryable
        self.status = status
        self.retry_after_s = retry_after_s
        self.request_id = whole_characters(request_id) if request_id else None
        self.at_once = at_once
        """Whether the first retry need not wait: nothing says that the provider has too much to do."""
        self.was_refused = was_refused
        """Whether the request was turned away, so that no model was called."""
        super().__init__()

    @property
    def code(self) -> str:
        """What went wrong, in one word."""
        return self._code[:MAX_CODE_CHARS]

    @property
    def message(self) -> str:
        """What went wrong, in the provider's words or ours."""
        return self._message[:MAX_MESSAGE_CHARS]

    def hide(self, secrets: Iterable[str]) -> None:
        """Take these out of the provider's words, as some quote the key and the prompt."""
        for secret in secrets:
            self._code = self._code.replace(secret, HIDDEN)
            self._message = self._message.replace(secret, HIDDEN)

    @property
    def is_rate_limit(self) -> bool:
        """Whether the provider asks for less, of this fleet as a whole."""
        limited = self.status == 429 or self.code.lower().startswith(("throttling", "limit_", "rate_limit"))
        return limited and self.retryable

    @property
    def is_exhausted(self) -> bool:
        """Whether the account has no money or quota left, so that no request of it helps."""
        return not self.retryable and (self.status == 402 or _MONEY.search(_name(self.code)) is not None)

    @property
    def is_of_model(self) -> bool:
        """Whether what is used up is this model's own, and others of the account go on."""
        return _FREE_TIER.search(_name(self.code)) is not None

    @property
    def is_refused_everywhere(self) -> bool:
        """Whether the request itself is at fault, so that no other provider need be asked."""
        name = _name(self.code)
        if self.retryable or _ACCOUNT.search(name):
            return False
        if _CONTENT.search(name) or self.status in _REQUEST_STATUS:
            return True
        return self.status not in _ACCOUNT_STATUS and _REQUEST.search(name) is not None

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
    lowered = _lowered(headers)
    payload = _payload_of(body)
    code, message, request_id = _read(payload)
    return UpstreamError(
        code=code or f"http_{status}",
        message=message or f"the provider answered HTTP {status}",
        retryable=_is_retryable(code, message, status, lowered.get("x-should-retry")),
        status=status,
        retry_after_s=_retry_after_s(lowered, now_s),
        request_id=request_id or lowered.get("x-request-id"),
        was_refused=True,
    )


def from_payload(payload: Mapping[str, Any], *, status: int | None = None) -> UpstreamError:
    """The error of a frame inside a 200."""
    code, message, request_id = _read(payload)
    error = payload.get("error")
    fields = error if isinstance(error, dict) else {}
    numbers = [status, fields.get("status_code"), fields.get("code")]
    known = next((number for number in numbers if isinstance(number, int) and 400 <= number < 600), None)
    given = fields.get("headers")
    headers = _lowered(given) if isinstance(given, dict) else {}
    return UpstreamError(
        code=code or "stream_error",
        message=message or "the provider reported an error in mid-stream",
        retryable=_is_retryable(code, message, known, headers.get("x-should-retry")),
        status=known,
        retry_after_s=_retry_after_s(headers, None),
        request_id=request_id,
    )


def from_error_text(text: str) -> UpstreamError:
    """The error that DashScope puts, as the text of a whole native frame, where output should stand."""
    match = _STATUS_IN_TEXT.search(text)
    return from_payload(_payload_of(whole_characters(text).encode()), status=int(match[1]) if match else None)


def too_long(max_bytes: int) -> UpstreamError:
    """The answer is longer than this job may have it."""
    message = (
        f"the answer is longer than {max_bytes} bytes, so it was cut; "
        "raise max_output_bytes of the job or of the worker, or bound the answer in the body"
    )
    return UpstreamError(code="output_too_long", message=message, retryable=False)


def _lowered(headers: Mapping[str, Any]) -> dict[str, str]:
    return {name.lower(): str(value) for name, value in headers.items()}


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
    return value if isinstance(value, str) and value and value != "error" else None


def _name(code: str) -> str:
    return code.lower().replace("_", "").replace(" ", "")


def _is_retryable(code: str | None, message: str, status: int | None, should_retry: str | None) -> bool:
    if should_retry in ("true", "false"):
        return should_retry == "true"
    name = _name(code or "")
    if name.startswith(("insufficientquota", "throttling.allocationquota")):
        return _EXHAUSTED.search(message) is None
    if _CONTENT.search(name) or _ACCOUNT.search(name):
        return False
    if _REQUEST.search(name):
        return status is not None and (status == 429 or status >= 500)
    if _PASSING.search(name):
        return True
    if status is not None:
        return status in _RETRYABLE_STATUS or status >= 500
    # An unknown error in mid-stream: it had begun to work, so it may work again.
    return True


def _retry_after_s(headers: Mapping[str, str], now_s: float | None) -> float | None:
    if (milliseconds := _number(headers.get("retry-after-ms"))) is not None:
        return milliseconds / 1000
    value = headers.get("retry-after")
    if value is None:
        return _limit_reset_s(headers)
    if (seconds := _number(value)) is not None or now_s is None:
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
    """A duration as Go writes it, 12ms or 1m30.5s; or bare seconds."""
    if (bare := _number(text)) is not None:
        return bare
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
