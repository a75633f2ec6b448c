"""Settings: one validated object, made from the environment."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from deltafan._errors import DeltafanError
from deltafan._retention import Retention
from deltafan._url import masked_url

PREFIX = "DELTAFAN_"
_SCHEMES = ("redis://", "rediss://", "unix://")


class SettingsError(DeltafanError):
    """The environment holds settings that can not be used; the message names all of them."""

    code = "settings_error"


def _redis_url(url: str) -> str:
    if not url.startswith(_SCHEMES):
        raise ValueError("must start with redis://, rediss:// or unix://")
    return url


RedisUrl = Annotated[str, AfterValidator(_redis_url)]
Seconds = Annotated[float, Field(gt=0, le=7 * 86_400)]


class Settings(BaseModel):
    """Everything an operator can set. The environment's name of a field is DELTAFAN_ and its name in capitals."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    redis_url: RedisUrl = "redis://localhost:6379/0"
    """The server of the queue and the ledger; one primary, not a cluster, because arq is none."""
    streams_url: RedisUrl = ""
    """The server of the jobs' streams; unset: the same."""
    prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")] = "deltafan"
    """Begins every key of ours, so that several fleets can share a server. arq's own keys have no prefix."""
    models: Path | None = None
    """The model catalogue; unset: the one that is shipped."""
    processes: Annotated[int, Field(ge=1, le=256)] = 1
    """Worker processes that `deltafan worker` starts; one saturates one core."""
    concurrency: Annotated[int, Field(ge=1, le=10_000)] = 100
    """Generations at once in each worker process."""
    lease_s: Annotated[float, Field(ge=2, le=300)] = 10.0
    """How long after a worker's death its jobs run again. Must exceed the longest stall of an event loop."""
    drain_timeout_s: Annotated[float, Field(ge=0, le=86_400)] = 30.0
    """How long a stopping worker lets its jobs end before it hands them over. Keep the supervisor's own limit above."""
    max_attempts: Annotated[int, Field(ge=1, le=100)] = 3
    """Model runs per job, over all workers."""
    max_retries: Annotated[int, Field(ge=0, le=20)] = 3
    """Further tries of one provider before the first delta, within a run."""
    stream_ttl_s: Seconds = 3600.0
    """How long a stream can be replayed after the job's end; at most result_ttl_s. A stream takes 4.3 KB at least."""
    result_ttl_s: Seconds = 86_400.0
    """How long the result is kept after the job's end."""
    queue_ttl_s: Seconds = 86_400.0
    """How long a job may wait and run; arq's own limit by default."""
    connect_timeout_s: Seconds = 10.0
    first_delta_timeout_s: Seconds = 300.0
    """From request to first data frame: long, since reasoning models queue and think before they speak."""
    silence_timeout_s: Seconds = 120.0
    """Between data frames after that; keep-alive comments do not count."""
    total_timeout_s: Seconds = 3600.0
    """For a whole model call."""
    replicas: Annotated[int, Field(ge=0, le=16)] = 0
    """Replicas that must have the end of a job before the queue is told; 0 where there are none."""
    replicas_timeout_ms: Annotated[int, Field(ge=1, le=60_000)] = 500
    ledger_max_records: Annotated[int, Field(ge=1000)] = 1_000_000
    """The usage ledger keeps about this many records; read it out before it turns over."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 8 * 1024 * 1024
    """The largest request body that `submit` accepts; images travel inside it."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"

    @model_validator(mode="before")
    @classmethod
    def _default_streams_url(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("streams_url"):
            return {**data, "streams_url": data.get("redis_url", cls.model_fields["redis_url"].default)}
        return data

    @model_validator(mode="after")
    def _check_lifetimes(self) -> Self:
        if self.stream_ttl_s > self.result_ttl_s:
            raise ValueError(
                f"stream_ttl_s ({self.stream_ttl_s:g}) must not exceed result_ttl_s ({self.result_ttl_s:g})"
            )
        return self

    @property
    def retention(self) -> Retention:
        """The three lifetimes as the library takes them."""
        return Retention(
            stream_ms=int(self.stream_ttl_s * 1000),
            result_ms=int(self.result_ttl_s * 1000),
            queue_ms=int(self.queue_ttl_s * 1000),
        )

    def __repr_args__(self) -> Any:
        for name, value in super().__repr_args__():
            yield name, masked_url(value) if name in ("redis_url", "streams_url") else value

    __str__ = BaseModel.__repr__


def load_settings(env: Mapping[str, str]) -> Settings:
    """Read the `DELTAFAN_*` variables of `env`.

    Raises:
        SettingsError: one of them is unknown or has a value that can not be used.
    """
    given = {name.removeprefix(PREFIX).lower(): value for name, value in env.items() if name.startswith(PREFIX)}
    complaints = [_unknown(name) for name in sorted(given.keys() - Settings.model_fields.keys())]
    known = {name: value for name, value in given.items() if name in Settings.model_fields}
    try:
        settings = Settings.model_validate(known)
    except ValidationError as error:
        complaints += [_complaint(detail, known) for detail in error.errors(include_url=False)]
    if complaints:
        raise SettingsError("\n".join(complaints))
    return settings


def _unknown(name: str) -> str:
    near = get_close_matches(name, Settings.model_fields, n=1)
    hint = f"did you mean {PREFIX}{near[0].upper()}?" if near else "`deltafan worker --help` lists what there is"
    return f"{PREFIX}{name.upper()} is not a setting; {hint}"


def _complaint(detail: Any, given: Mapping[str, str]) -> str:
    why = str(detail["msg"]).removeprefix("Value error, ")
    if not detail["loc"]:
        return why
    name = str(detail["loc"][0])
    value = given.get(name, "")
    shown = masked_url(value) if name.endswith("_url") else value
    return f"{PREFIX}{name.upper()}={shown}: {why[:1].lower() + why[1:]}"
