"""Every error that deltafan raises, split by who must act.

DeltafanError
├── InvalidRequest (also ValueError)     the caller: mend the request
│   └── InvalidPosition                  the caller: pass a position that an event carried
├── JobConflict                          the caller: this id belongs to another request
├── QueueFull                            the caller: submit again later; too many jobs wait
├── JobNotFound                          the caller: no such job, or everything about it has expired
├── StreamExpired                        the data is gone; says whether the result is still there
├── JobEnded                             the job ended without an answer; carries what there is of it
│   ├── JobFailed
│   └── JobCancelled
├── ResultTimeout (also TimeoutError)    the job is still going on
├── RedisUnavailable (also ConnectionError)  the operator: no server answers at the URL
└── ProtocolError                        a peer wrote what PROTOCOL.md does not allow
"""

from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from deltafan._fold import Generation


class DeltafanError(Exception):
    """Root of all errors raised on purpose by this library."""

    code: ClassVar[str] = "deltafan_error"
    """Stable, machine-readable name of the error."""
    retryable: ClassVar[bool] = False
    """Whether the same call may succeed later without anybody changing anything."""
    job_ids: tuple[str, ...] = ()
    """Of a submit: the ids of all jobs that had been sent, in the order of the requests; each may be accepted."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Not by calling the class, whose arguments are not the message: errors cross processes (multiprocessing, arq).
        return _restore, (type(self), self.args, vars(self))


def _restore(kind: type[DeltafanError], args: tuple[Any, ...], attributes: dict[str, Any]) -> DeltafanError:
    error = kind.__new__(kind)
    error.args = args
    vars(error).update(attributes)
    return error


class InvalidRequest(DeltafanError, ValueError):
    """A request was refused before anything was sent."""

    code = "invalid_request"

    def __init__(self, field: str, why: str) -> None:
        self.field = field
        self.why = why
        super().__init__(f"{field}: {why}")


class InvalidPosition(InvalidRequest):
    """A position is not of the form `<attempt>-<seq>`, or not in the stream that it is to be read on from."""

    code = "invalid_position"

    def __init__(self, text: str, why: str = "is not <attempt>-<seq>") -> None:
        super().__init__("position", f"{text[:64]!r} {why}; pass the position of an event you have seen")


class JobError(DeltafanError):
    """An error about one job."""

    code = "job_error"

    def __init__(self, job_id: str, message: str) -> None:
        self.job_id = job_id
        super().__init__(f"job {job_id}: {message}")


class JobConflict(JobError):
    """The id is taken by a job with another model, api or body."""

    code = "job_conflict"

    def __init__(self, job_id: str) -> None:
        super().__init__(
            job_id, "another request was submitted under this id; use a new id, or submit the same model, api and body"
        )


class QueueFull(JobError):
    """The job was not submitted, because `limit` jobs or more wait in its lane."""

    code = "queue_full"
    retryable = True

    def __init__(self, job_id: str, lane: str, waiting: int, limit: int) -> None:
        self.lane = lane
        self.waiting = waiting
        self.limit = limit
        super().__init__(
            job_id, f"not submitted: {waiting} jobs wait in lane {lane} and {limit} may; submit it again later"
        )


class JobNotFound(JobError):
    """Nothing is known of the job."""

    code = "job_not_found"

    def __init__(self, job_id: str) -> None:
        super().__init__(
            job_id, "not found: it was never submitted to this server and prefix, or all of it has expired"
        )


class StreamExpired(JobError):
    """The job's stream is gone, so it can not be replayed."""

    code = "stream_expired"

    def __init__(self, job_id: str, *, result_available: bool) -> None:
        self.result_available = result_available
        rest = "its result is still there: ask for result()" if result_available else "its result has expired as well"
        super().__init__(job_id, f"its stream has expired; {rest}")


class JobEnded(JobError):
    """The job ended without completing."""

    code = "job_ended"

    def __init__(self, job_id: str, message: str, generation: "Generation") -> None:
        self.generation = generation
        super().__init__(job_id, message)


class JobFailed(JobEnded):
    """The job failed; `generation` holds the error and what was generated before it."""

    code = "job_failed"


class JobCancelled(JobEnded):
    """The job was cancelled; `generation` holds what was generated before."""

    code = "job_cancelled"


class ResultTimeout(JobError, TimeoutError):
    """No result within the given time; the job itself goes on."""

    code = "result_timeout"
    retryable = True

    def __init__(self, job_id: str, timeout_s: float, status: str) -> None:
        self.timeout_s = timeout_s
        self.status = status
        super().__init__(
            job_id, f"no result after {timeout_s:g} s (status {status}); the job goes on, ask again or cancel it"
        )


class RedisUnavailable(DeltafanError, ConnectionError):
    """No server answers at the URL, or it refused to serve us."""

    code = "redis_unavailable"
    retryable = True

    def __init__(self, url: str, why: str) -> None:
        self.url = url
        self.why = why
        super().__init__(f"Redis at {url}: {why}")


class ProtocolError(DeltafanError):
    """An entry or a record is not what PROTOCOL.md says."""

    code = "protocol_error"
