"""When to try a model call again: only before its first delta, and only while it may help."""

from deltafan_worker._upstream_error import UpstreamError

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 8.0
"""As the vendors' own SDKs do."""
LONGEST_RETRY_AFTER_S = 60.0
"""A provider that asks for more is not worth holding a slot for."""


def pause_before(retry: int, error: UpstreamError, *, max_retries: int, jitter: float) -> float | None:
    """Seconds to wait before retry number `retry` (1, 2, …), or None when there is to be none.

    The provider's Retry-After decides where it gave one; else the pause doubles, less up to a quarter by `jitter`
    (0 to 1), so that a fleet that was refused at once does not come back at once.
    """
    if not error.retryable or retry > max_retries:
        return None
    if error.retry_after_s is not None:
        return error.retry_after_s if error.retry_after_s <= LONGEST_RETRY_AFTER_S else None
    if error.at_once and retry == 1:
        return 0.0
    return min(FIRST_PAUSE_S * 2.0 ** (retry - 1), LONGEST_PAUSE_S) * (1 - jitter / 4)
