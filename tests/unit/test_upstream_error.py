"""Reading providers' errors: what may be tried again, when, and whether elsewhere."""

import orjson
import pytest

from deltafan_worker._upstream_error import UpstreamError, from_error_text, from_payload, from_response


def refused(status: int, code: str | None = None, message: str = "", **headers: str) -> UpstreamError:
    body = orjson.dumps({"error": {"code": code, "message": message}}) if code else b""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return from_response(status, named, body, now_s=1_000_000_000)


@pytest.mark.parametrize(
    ("error", "retryable", "everywhere"),
    [
        (refused(400, "invalid_request_error"), False, True),
        (refused(400), False, True),
        (refused(400, "Arrearage"), False, False),
        (refused(400, "data_inspection_failed"), False, True),
        (refused(401, "invalid_api_key"), False, False),
        (refused(403, "access_denied"), False, False),
        (refused(404, "model_not_found"), False, False),
        (refused(413), False, True),
        (refused(429, "rate_limit_exceeded"), True, False),
        (
            refused(429, "insufficient_quota", "You exceeded your current quota, check your plan and billing"),
            False,
            False,
        ),
        (
            refused(429, "insufficient_quota", "Allocated quota exceeded, please increase your quota limit."),
            True,
            False,
        ),
        (refused(429, "Throttling.AllocationQuota", "month allocated quota exceeded"), False, False),
        (refused(429, "CommodityNotPurchased"), False, False),
        (refused(500), True, False),
        (refused(503, "ModelUnavailable"), True, False),
        (refused(400, "x", x_should_retry="true"), True, False),
        (refused(500, "x", x_should_retry="false"), False, False),
        (from_payload({"code": "Throttling.BurstRate", "message": "m"}), True, False),
        (from_payload({"error": "a bare word"}), True, False),
        (from_payload({"error": {"code": 400, "message": "Token limit"}}), False, True),
    ],
)
def test_what_may_be_tried_again_and_where(error: UpstreamError, retryable: bool, everywhere: bool) -> None:
    assert (error.retryable, error.is_refused_everywhere) == (retryable, everywhere)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry_after": "7"}, 7),
        ({"retry_after_ms": "250", "retry_after": "7"}, 0.25),
        ({"retry_after": "Sun, 09 Sep 2001 01:46:45 GMT"}, 5),
        ({"retry_after": "soon"}, None),
        ({"retry_after": "-1"}, None),
        ({"x_ratelimit_remaining_requests": "0", "x_ratelimit_reset_requests": "1m30s"}, 90),
        ({"x_ratelimit_remaining_tokens": "0", "x_ratelimit_reset_tokens": "12ms"}, 0.012),
        ({"x_ratelimit_remaining_tokens": "0", "x_ratelimit_reset_tokens": "6m0s"}, 360),
        ({"x_ratelimit_remaining_tokens": "5", "x_ratelimit_reset_tokens": "12ms"}, None),
        ({"x_ratelimit_remaining_requests": "-1", "x_ratelimit_reset_requests": "0"}, None),
        ({}, None),
    ],
)
def test_how_long_a_provider_asks_to_wait(headers: dict[str, str], seconds: float | None) -> None:
    assert refused(429, "rate_limit_exceeded", **headers).retry_after_s == seconds


def test_only_a_limit_that_passes_is_a_rate_limit() -> None:
    assert refused(429).is_rate_limit
    assert from_payload({"code": "Throttling.RateQuota", "message": ""}).is_rate_limit
    assert not refused(429, "insufficient_quota", "exceeded your current quota").is_rate_limit
    assert not refused(503).is_rate_limit


def test_the_frame_inside_an_error_finish_is_read() -> None:
    text = (
        'id:1\nevent:error\n:HTTP_STATUS/429\ndata:{"request_id":"r","code":"Throttling.AllocationQuota","message":"m"}'
    )
    error = from_error_text(text)
    assert (error.code, error.status, error.request_id) == ("Throttling.AllocationQuota", 429, "r")


def test_neither_repr_nor_str_quotes_the_provider() -> None:
    error = refused(400, "invalid_request_error", "can not read 'my prompt'")
    assert "prompt" not in repr(error) + str(error)
    assert "prompt" in error.message
