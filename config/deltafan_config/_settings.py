"""Settings: one validated object, made from the environment."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails
from redis.asyncio.connection import Connection, parse_url
from redis.exceptions import RedisError

from deltafan._errors import DeltafanError
from deltafan._request import MAX_BODY_BYTES
from deltafan._retention import Retention
from deltafan._url import UNREADABLE, masked_url

PREFIX = "DELTAFAN_"
_SCHEMES = ("redis://", "rediss://", "unix://")
_URLS = ("redis_url", "streams_url")


class SettingsError(DeltafanError):
    """The environment holds settings that can not be used; the message has one line for each of them."""

    code = "settings_error"


def _redis_url(url: str) -> str:
    if not url.startswith(_SCHEMES):
        raise ValueError("must start with redis://, rediss:// or unix://")
    try:
        options: dict[str, Any] = dict(parse_url(url))
        options.pop("max_connections", None)
        options.pop("connection_class", Connection)(**options)  # opens nothing, but knows all options
    except (ValueError, TypeError, RedisError) as error:
        raise ValueError(_why_unusable(url, error)) from None
    database = "" if url.startswith("unix:") else urlsplit(url).path.strip("/")
    if database and not database.isdecimal():
        raise ValueError("the number of a database is all that may follow the host")
    return url


def _why_unusable(url: str, error: Exception) -> str:
    if masked_url(url) == UNREADABLE:  # its own words would quote parts of the password
        return "is no URL of a server; percent-encode what its password holds of /, ?, # and @"
    if isinstance(error, TypeError):
        return f"{str(error).rpartition(' ')[2]} is not an option of such a URL"
    return str(error)


RedisUrl = Annotated[str, AfterValidator(_redis_url)]
Timeout = Annotated[float, Field(gt=0, le=86_400)]
"""Seconds, up to a day: what is longer was most likely meant in ms."""
Lifetime = Annotated[float, Field(ge=0.001, le=30 * 86_400)]
"""Seconds, from the ms that Redis counts in up to the 30 days that a single job may ask for."""


class Settings(BaseModel):
    """Everything an operator can set. The variable of a field is DELTAFAN_ and its name in capitals.

    Passwords in URLs are masked in `repr` and `str`; the fields themselves hold them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, hide_input_in_errors=True)

    redis_url: RedisUrl = "redis://localhost:6379/0"
    """The server of the queue and the ledger; one primary, not a cluster, because arq is made for one."""
    streams_url: RedisUrl = ""
    """The server of the jobs' streams. Unset: redis_url, which also saves a round trip per submit."""
    prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")] = "deltafan"
    """Begins every key of ours, so that several fleets can share a server. arq's own keys have no prefix."""
    models: Path | None = None
    """The model catalogue's file. Unset: the one that is shipped."""
    concurrency: Annotated[int, Field(ge=1, le=10_000)] = 100
    """Generations at once in each worker process. They mostly wait, so raise it until the core or a provider's rate
    limit is full; the fleet's capacity is this times all processes."""
    processes: Annotated[int, Field(ge=1, le=256)] = 1
    """Worker processes that `deltafan worker` starts; each can fill one core, so at most the machine's cores."""
    lease_s: Annotated[float, Field(ge=2, le=300)] = 8.0
    """How long after a worker's death its jobs run again. Renewed at least three times in that span, so two renewals
    may be lost. Shorter than a stall of the event loop or a failover, it lets living workers lose their jobs."""
    lanes: Literal["all", "interactive", "batch"] = "all"
    """Which jobs a worker takes."""
    interactive_share: Annotated[float, Field(ge=0, le=0.9)] = 0.1
    """Part of each worker's slots that batch jobs leave free, so that an interactive job starts at once however much
    batch work there is; and part of a provider's limits that they leave while there are interactive jobs."""
    batch_share: Annotated[float, Field(ge=0, le=0.9)] = 0.1
    """Part of each worker's slots that batch jobs get even while interactive jobs wait, once they have waited for
    batch_patience_s; 0: none, so interactive jobs alone can keep batch jobs waiting for ever."""
    batch_patience_s: Annotated[float, Field(ge=0, le=3600)] = 10.0
    """How long batch jobs wait at a worker that is full of interactive ones."""
    quota_pause_s: Annotated[float, Field(ge=1, le=86_400)] = 60.0
    """When a provider says that the account's money or quota is used up, batch jobs wait so long before one of them
    tries again; interactive jobs fail at once."""
    drain_timeout_s: Annotated[float, Field(ge=0, le=86_400)] = 30.0
    """How long a stopping worker lets its jobs end before it hands them over; 0: at once. The supervisor must wait
    longer before it kills: docker stop waits 10 s and Kubernetes 30 s unless told otherwise."""
    max_attempts: Annotated[int, Field(ge=1, le=100)] = 3
    """Model runs per job, over all workers; each can cost money. Replays of an answer are not counted."""
    stream_ttl_s: Lifetime = 3600.0
    """How long a stream can be replayed after the job's end; at most result_ttl_s. It takes 4.3 KB of the server at
    least, the result much less."""
    result_ttl_s: Lifetime = 86_400.0
    """How long the result is kept after the job's end; at least stream_ttl_s."""
    queue_ttl_s: Lifetime = 86_400.0
    """How long a job may wait and run, from its submit; a day is arq's own limit. Keep it above total_timeout_s."""
    connect_timeout_s: Timeout = 10.0
    """Until a provider accepts the connection, TLS included. A provider or model may override all four timeouts."""
    first_delta_timeout_s: Timeout = 300.0
    """From the request to the first data frame. Long, since reasoning models queue and think before they speak:
    DeepSeek holds a request for up to 600 s before it starts."""
    silence_timeout_s: Timeout = 120.0
    """Between data frames after that. Keep-alive comments do not count: DashScope has sent them for 15 minutes on a
    request that never answered."""
    total_timeout_s: Timeout = 3600.0
    """For a whole model call; it ends what the other timeouts would still allow."""
    max_retries: Annotated[int, Field(ge=0, le=20)] = 3
    """Further tries of one provider before the first delta, within one run; 0: none. Then comes the next provider."""
    max_queued: Annotated[int, Field(ge=1)] | None = None
    """A submit is refused while so many jobs of its lane wait for a worker. Unset: never, so
    they fill Redis' memory."""
    max_output_bytes: Annotated[int, Field(ge=1024)] = 16 * 1024 * 1024
    """The longest answer of a model call, all its deltas together; a job may ask for less. What is longer ends with
    output_too_long. Ordinary answers stay below 1 MiB, speech needs 85 KB a second."""
    replicas: Annotated[int, Field(ge=0, le=16)] = 0
    """Replicas that must have a submit or a cancel before it is acknowledged, and a job's end before the queue is told
    (WAIT); 0: none. Never detected, since a replica that is down must not lower the promise."""
    replicas_timeout_ms: Annotated[int, Field(ge=1, le=8_000)] = 500
    """How long a worker waits for them; after that it warns and goes on. Without effect while replicas is 0."""
    sweep_interval_s: Annotated[float, Field(ge=2, le=3600)] = 60.0
    """How often one of the workers looks for jobs that a crash between two servers left to nobody. Such a job is given
    back or ended when it has been found twice."""
    ledger_max_records: Annotated[int, Field(ge=1000)] = 1_000_000
    """The usage ledger keeps about this many records and drops the oldest; read it out before it turns over."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = MAX_BODY_BYTES
    """The largest request body that a submit accepts. Images travel inside it as base64, hence MiBs."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severe message that is logged."""
    log_format: Literal["text", "json"] = "text"
    """Lines for people, or one JSON object a line for machines."""

    @field_validator("streams_url", mode="before")
    @classmethod
    def _default_to_redis_url(cls, url: object, info: ValidationInfo) -> object:
        # A refused redis_url is not among the data; then any good URL will do, as one complaint is enough.
        return url or info.data.get("redis_url", cls.model_fields["redis_url"].default)

    @field_validator("result_ttl_s")
    @classmethod
    def _outlive_the_stream(cls, result_ttl_s: float, info: ValidationInfo) -> float:
        stream_ttl_s = info.data.get("stream_ttl_s", 0.0)
        if result_ttl_s < stream_ttl_s:
            raise ValueError(f"must be at least {_variable('stream_ttl_s')}, which is {stream_ttl_s:g}")
        return result_ttl_s

    @property
    def retention(self) -> Retention:
        """The lifetimes as the library takes them."""
        return Retention(
            stream_ms=round(self.stream_ttl_s * 1000),
            result_ms=round(self.result_ttl_s * 1000),
            queue_ms=round(self.queue_ttl_s * 1000),
        )

    @property
    def state_ttl_s(self) -> float:
        """How long a job's state is kept after its end: an hour longer than anything that refers to it."""
        return self.retention.state_ms / 1000

    def __repr_args__(self) -> Any:
        for name, value in super().__repr_args__():
            yield name, masked_url(value) if name in _URLS else value

    __str__ = BaseModel.__repr__


def load_settings(env: Mapping[str, str]) -> Settings:
    """Read the `DELTAFAN_*` variables of `env`. Blanks around a value are ignored; an empty one counts as not set.

    Raises:
        SettingsError: at least one is unknown or has a value that can not be used; all of them are named.
    """
    fields = {_variable(field): field for field in Settings.model_fields}
    given = {name: value.strip() for name, value in env.items() if name.startswith(PREFIX)}
    complaints = [_unknown(name) for name in sorted(given.keys() - fields.keys())]
    known = {fields[name]: value for name, value in given.items() if name in fields and value}
    try:
        settings = Settings.model_validate(known)
    except ValidationError as error:
        complaints += [_complaint(detail, known) for detail in error.errors(include_url=False)]
    if complaints:
        raise SettingsError("\n".join(complaints))
    return settings


def _variable(field: str) -> str:
    return PREFIX + field.upper()


def _unknown(name: str) -> str:
    near = get_close_matches(name.removeprefix(PREFIX).lower(), Settings.model_fields, n=1)
    if near:
        return f"{name} is not a setting; did you mean {_variable(near[0])}?"
    return f"{name} is not a setting; there are {', '.join(sorted(map(_variable, Settings.model_fields)))}"


def _complaint(detail: ErrorDetails, given: Mapping[str, str]) -> str:
    name = str(detail["loc"][0])
    value = given.get(name)
    if value is None:
        shown = f" is not set, so it is {detail['input']}"
    else:
        shown = f"={masked_url(value) if name in _URLS else value!r}"
    why = detail["msg"].removeprefix("Value error, ")
    return f"{_variable(name)}{shown}: {why[:1].lower()}{why[1:]}"
