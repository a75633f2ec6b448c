"""Reading providers' errors: what may be tried again, when, and whether elsewhere."""

import orjson
import pytest

from deltafan_worker._upstream_error import (
    MAX_MESSAGE_CHARS,
    UpstreamError,
    from_error_text,
    from_payload,
    from_response,
)


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
        (refused(400, "billing_hard_limit_reached"), False, False),
        (refused(403, "AllocationQuota.FreeTierOnly"), False, False),
        (refused(500), True, False),
        (refused(503, "ModelUnavailable"), True, False),
        (refused(400, "x", x_should_retry="true"), True, False),
        (refused(500, "x", x_should_retry="false"), False, False),
        (from_payload({"code": "Throttling.BurstRate", "message": "m"}), True, False),
        (from_payload({"error": "a bare word"}), True, False),
        (from_payload({"error": {"code": 400, "message": "Token limit"}}), False, True),
        # Generic names beside a status that tells more: DeepSeek's empty account, OpenAI's wrong key.
        (refused(402, "invalid_request_error", "Insufficient Balance"), False, False),
        (refused(401, "invalid_request_error"), False, False),
        (refused(403, "invalid_request_error"), False, False),
        (refused(404, "invalid_request_error"), False, False),
        (refused(429, "invalid_request_error"), True, False),
        (refused(500, "invalid_parameter_error"), True, False),
        (refused(403, "content_policy_violation"), False, True),
        (refused(400, "insufficient_quota", "check your billing"), False, False),
    ],
)
def test_what_may_be_tried_again_and_where(error: UpstreamError, retryable: bool, everywhere: bool) -> None:
    assert (error.retryable, error.is_refused_everywhere) == (retryable, everywhere)


PASSES, PERMANENT, CONTENT, REQUEST = (True, False), (False, False), (False, True), (False, True)
DASHSCOPE = [
    (400, "InvalidParameter", REQUEST),
    (400, "invalid_parameter_error", REQUEST),
    (400, "BadRequest.TooLarge", REQUEST),
    (400, "InternalError.Algo.InvalidParameter", REQUEST),
    (400, "DataInspectionFailed", CONTENT),
    (400, "data_inspection_failed", CONTENT),
    (400, "FaqRuleBlocked", CONTENT),
    (400, "CustomRoleBlocked", CONTENT),
    (400, "IPInfringementSuspect", CONTENT),
    (400, "Arrearage", PERMANENT),
    (401, "InvalidApiKey", PERMANENT),
    (401, "invalid_api_key", PERMANENT),
    (403, "AccessDenied", PERMANENT),
    (403, "access_denied", PERMANENT),
    (403, "AccessDenied.Unpurchased", PERMANENT),
    (403, "Model.AccessDenied", PERMANENT),
    (403, "AllocationQuota.FreeTierOnly", PERMANENT),
    (404, "ModelNotFound", PERMANENT),
    (404, "model_not_found", PERMANENT),
    (429, "Throttling", PASSES),
    (429, "Throttling.RateQuota", PASSES),
    (429, "LimitRequests", PASSES),
    (429, "limit_requests", PASSES),
    (429, "Throttling.BurstRate", PASSES),
    (429, "limit_burst_rate", PASSES),
    (429, "Throttling.Concurrency", PASSES),
    (429, "Throttling.ResourceExhausted", PASSES),
    (429, "Throttling.AllocationQuota", PASSES),
    (429, "insufficient_quota", PASSES),
    (429, "CommodityNotPurchased", PERMANENT),
    (429, "PrepaidBillOverdue", PERMANENT),
    (429, "PostpaidBillOverdue", PERMANENT),
    (500, "InternalError", PASSES),
    (500, "internal_error", PASSES),
    (500, "InternalError.Algo", PASSES),
    (500, "SystemError", PASSES),
    (500, "ModelServiceFailed", PASSES),
    (500, "RequestTimeOut", PASSES),
    (504, "RequestTimeOut", PASSES),
    (503, "ModelUnavailable", PASSES),
    (503, "ServiceUnavailable", PASSES),
]
"""The codes of DashScope's documentation, November 2026."""
RESPONSES = [
    ("server_error", PASSES),
    ("rate_limit_exceeded", PASSES),
    ("vector_store_timeout", PASSES),
    ("invalid_prompt", CONTENT),
    ("bio_policy", CONTENT),
    ("misalignment_policy_violation", CONTENT),
    ("invalid_image", REQUEST),
    ("invalid_image_format", REQUEST),
    ("data_residency_mismatch", PERMANENT),
]
"""What `response.error.code` may be."""


@pytest.mark.parametrize(("status", "code", "verdict"), DASHSCOPE)
def test_a_code_means_the_same_in_every_form(status: int, code: str, verdict: tuple[bool, bool]) -> None:
    flat = {"code": code, "message": "m"}
    for error in (
        refused(status, code),
        from_response(status, {}, orjson.dumps(flat)),
        from_payload(flat, status=status),
        from_payload(flat),
        from_payload({"error": flat}),
    ):
        assert (error.retryable, error.is_refused_everywhere) == verdict


@pytest.mark.parametrize(("code", "verdict"), RESPONSES)
def test_a_failed_response_tells_by_its_code_alone(code: str, verdict: tuple[bool, bool]) -> None:
    error = from_payload({"error": {"code": code, "message": "m"}})
    assert (error.retryable, error.is_refused_everywhere) == verdict


def test_a_stream_tells_how_long_to_wait_as_well() -> None:
    headers = {"X-RateLimit-Remaining-Requests": 0, "x-ratelimit-reset-requests": "59.5"}
    error = from_payload({"error": {"code": "rate_limit_exceeded", "message": "m", "headers": headers}})
    assert error.retry_after_s == 59.5
    date = {"retry-after": "Sun, 09 Sep 2001 01:46:45 GMT"}
    assert from_payload({"error": {"code": "x", "headers": date}}).retry_after_s is None, "there is no clock here"


def test_what_is_hidden_is_nowhere() -> None:
    error = refused(401, "no sk-planted-key", "x" * (MAX_MESSAGE_CHARS - 5) + "sk-planted-key")
    error.hide(["sk-planted-key"])
    shown = f"{error.code} {error.message} {error!r} {error} {error.args}"
    assert "sk-p" not in shown


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
        ({"x_ratelimit_remaining_tokens": "0", "x_ratelimit_reset_tokens": "59.5"}, 59.5),
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


@pytest.mark.parametrize(
    ("error", "exhausted", "of_its_model"),
    [
        (refused(403, "AllocationQuota.FreeTierOnly"), True, True),
        (refused(400, "billing_hard_limit_reached"), True, False),
        (refused(400, "Arrearage"), True, False),
        (refused(402), True, False),
        (refused(403, "access_denied"), False, False),
        (refused(429), False, False),
    ],
)
def test_whose_quota_is_used_up(error: UpstreamError, exhausted: bool, of_its_model: bool) -> None:
    assert (error.is_exhausted, error.is_exhausted and error.is_of_model) == (exhausted, of_its_model)


def test_half_a_character_inside_an_error_finish_is_no_defect() -> None:
    assert "no \ufffd" in from_error_text('{"code": "c", "message": "no \ud83d"}').message


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
