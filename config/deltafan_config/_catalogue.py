"""The model catalogue: which provider serves which model, at what price."""

import re
import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from deltafan._errors import DeltafanError

Api = Literal["chat", "responses", "dashscope"]
Continuation = Literal["partial", "prefix", "continue_final_message", "background"]
"""Chat Completions: DashScope's `partial`, DeepSeek's `prefix`, vLLM's `continue_final_message`. Responses: OpenAI's
`background`."""
Seconds = Annotated[float, Field(gt=0)]
PerMillion = Annotated[float, Field(ge=0)]

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)


class CatalogueError(DeltafanError):
    """The catalogue file can not be used; the message has one line for each reason."""

    code = "catalogue_error"


class UnknownModel(DeltafanError):
    """No provider is known for a model."""

    code = "unknown_model"

    def __init__(self, model: str, near: Iterable[str]) -> None:
        self.model = model
        names = " or ".join(near)
        hint = f"did you mean {names}?" if names else "`deltafan models` lists what there is."
        super().__init__(
            f"model {model[:128]!r} is not in the catalogue; {hint} Any other is addressed as provider/model."
        )


class MissingKey(DeltafanError):
    """A provider's key is not in the environment."""

    code = "missing_key"

    def __init__(self, provider: str, variable: str) -> None:
        self.provider = provider
        self.variable = variable
        super().__init__(f"provider {provider} needs a key: set {variable} in the worker's environment")


class _Table(BaseModel):
    """A table of the file. Strict, since TOML has types: `input = true` is no price."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _know_all_keys(cls, table: object) -> object:
        known = {info.alias or name for name, info in cls.model_fields.items()}
        unknown = sorted(table.keys() - known) if isinstance(table, dict) else []
        if unknown:
            raise ValueError("; ".join(f"there is no {_key(key)} here, {_hint(key, known)}" for key in unknown))
        return table


class TimeoutOverrides(_Table):
    """Limits in seconds; what is left out is as in the settings."""

    connect_s: Seconds | None = None
    first_delta_s: Seconds | None = None
    silence_s: Seconds | None = None
    total_s: Seconds | None = None

    def over(self, other: Self) -> Self:
        """Both together; this one wins."""
        return self.model_validate(other.model_dump(exclude_none=True) | self.model_dump(exclude_none=True))


class Limits(_Table):
    """What all workers together may ask for, within any 60 seconds and at once; what is left out is not limited."""

    requests_per_minute: PositiveInt | None = None
    tokens_per_minute: PositiveInt | None = None
    """Input and output together."""
    concurrency: PositiveInt | None = None
    """Calls at once."""


class Price(_Table):
    """Per million tokens. A kind of token without its own price costs what the input or output costs it is part of."""

    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")]
    """ISO 4217, such as USD or CNY."""
    input: PerMillion
    output: PerMillion
    cached_input: PerMillion | None = None
    cache_write: PerMillion | None = None
    reasoning: PerMillion | None = None
    input_audio: PerMillion | None = None
    output_audio: PerMillion | None = None


def _base_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be a http:// or https:// URL")
    if "@" in parts.netloc:
        raise ValueError("must not hold credentials; name the key's variable with api_key_env")
    if parts.query or parts.fragment:
        raise ValueError("must end with its path: the endpoint's name is appended to it")
    return url.rstrip("/")


def _key_variable(name: str) -> str:
    # A key that was pasted here would end up in messages, so what does not look like a variable is refused unseen.
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
        raise ValueError("must be the name of a variable, in capitals, not the key itself")
    return name


def _as_tuple(value: object) -> object:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


class Provider(_Table):
    """An upstream account."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    """The table's own name; without a slash, because the first one ends it in `provider/model`."""
    base_url: Annotated[str, AfterValidator(_base_url)]
    """Without the endpoint's name and the slash before it."""
    apis: Annotated[tuple[Api, ...], BeforeValidator(_as_tuple), Field(min_length=1)] = Field(
        default=("chat",), alias="api"
    )
    """`api` in the file, one name or a list: what it speaks under this base URL."""
    continuation: Annotated[tuple[Continuation, ...], BeforeValidator(_as_tuple)] = ()
    """How it goes on with an answer that broke off, for jobs that ask for it; one name or a list."""
    api_key_env: Annotated[str, AfterValidator(_key_variable)] | None = None
    """Name of the variable that holds the key; None: no key is sent."""
    headers: Mapping[str, str] = Field(default_factory=dict, repr=False)
    """Sent with every request."""
    timeouts: TimeoutOverrides = TimeoutOverrides()
    limits: Limits = Limits()
    """Of the account, for all models together."""

    def api_key(self, env: Mapping[str, str]) -> SecretStr | None:
        """The key, or None where none is needed.

        Raises:
            MissingKey: one is needed and not there.
        """
        if self.api_key_env is None:
            return None
        if not (key := env.get(self.api_key_env, "").strip()):
            raise MissingKey(self.name, self.api_key_env)
        return SecretStr(key)


class Model(_Table):
    """A model and who serves it."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    """The table's own name, which requests ask for."""
    providers: Annotated[tuple[str, ...], BeforeValidator(_as_tuple), Field(min_length=1)] = Field(alias="provider")
    """`provider` in the file, one name or a list: tried in order."""
    upstream_name: Annotated[str, Field(min_length=1)] | None = None
    """What the providers call it; None: the same."""
    price: Price | None = None
    """None: usage records tell tokens, but no cost."""
    max_output_tokens: PositiveInt | None = None
    """For information: the provider enforces it, deltafan does not."""
    context_tokens: PositiveInt | None = None
    """For information as well: input and output together."""
    defaults: Mapping[str, Any] = Field(default_factory=dict)
    """Goes under the request's body."""
    timeouts: TimeoutOverrides = TimeoutOverrides()
    """Over the provider's."""
    limits: Limits = Limits()
    """Of this model at each of its providers; the provider's own hold besides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One provider's way to a model."""

    provider: Provider
    model: str
    """The name the provider knows."""
    price: Price | None = None
    timeouts: TimeoutOverrides = field(default_factory=TimeoutOverrides)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)


def _name_entries(tables: object) -> object:
    """Each entry with the name of its table put into it."""
    if not isinstance(tables, Mapping):
        return tables
    for name, entry in tables.items():
        if isinstance(entry, Mapping) and "name" in entry:
            raise ValueError(f"{_key(name)} has its name already; what a model is called upstream is upstream_name")
    return {name: {**entry, "name": name} if isinstance(entry, Mapping) else entry for name, entry in tables.items()}


class Catalogue(_Table):
    """All providers and models, by name."""

    providers: Annotated[Mapping[str, Provider], BeforeValidator(_name_entries)]
    models: Annotated[Mapping[str, Model], BeforeValidator(_name_entries)] = Field(default_factory=dict)

    @classmethod
    def load(cls, path: Path | None = None) -> Self:
        """Read a catalogue file; without a path, the one that is shipped.

        Raises:
            CatalogueError: it is missing, no TOML, or says something that can not be.
        """
        source = path or shipped()
        try:
            return cls.model_validate(tomllib.loads(source.read_text(encoding="utf-8")))
        except OSError as error:
            reasons = [f"can not be read ({error.strerror}); set DELTAFAN_MODELS to a catalogue"]
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            reasons = [f"is not TOML: {error}"]
        except ValidationError as error:
            reasons = [_complaint(detail) for detail in error.errors(include_url=False)]
        raise CatalogueError("\n".join(f"{source}: {reason}" for reason in reasons))

    @field_validator("models")
    @classmethod
    def _know_their_providers(cls, models: Mapping[str, Model], info: ValidationInfo) -> Mapping[str, Model]:
        providers: Mapping[str, Provider] | None = info.data.get("providers")
        if providers is None:  # they were refused themselves
            return models
        missing = [(model.name, name) for model in models.values() for name in model.providers if name not in providers]
        if missing:
            raise ValueError(
                "; ".join(
                    f"{_key(model)} has no provider {_key(name)}, {_hint(name, providers)}" for model, name in missing
                )
            )
        return models

    def resolve(self, model: str) -> tuple[Route, ...]:
        """The ways to a model, in the order to try them. `provider/model` leads to one that is not listed.

        A listed model goes first, so its name may contain slashes; so may the part after the provider.

        Raises:
            UnknownModel: neither a listed model nor `provider/model` with a provider that is.
        """
        if (entry := self.models.get(model)) is not None:
            return tuple(_route(self.providers[name], entry) for name in entry.providers)
        name, _, rest = model.partition("/")
        if rest and name in self.providers:
            provider = self.providers[name]
            return (Route(provider=provider, model=rest, timeouts=provider.timeouts),)
        unlisted = [f"{near}/{rest}" for near in get_close_matches(name, self.providers, n=1)] if rest else []
        raise UnknownModel(model, unlisted + get_close_matches(model, self.models, n=2))


def _route(provider: Provider, model: Model) -> Route:
    return Route(
        provider=provider,
        model=model.upstream_name or model.name,
        price=model.price,
        timeouts=model.timeouts.over(provider.timeouts),
        defaults=model.defaults,
        limits=model.limits,
    )


def shipped() -> Path:
    """The catalogue inside the installed package or, in a checkout, the file beside it that it is made from."""
    inside = Path(__file__).with_name("models.toml")
    return inside if inside.exists() else inside.parents[1] / inside.name


def _key(name: object) -> str:
    """As TOML writes a key."""
    text = str(name)
    return text if _BARE_KEY.fullmatch(text) else f'"{text}"'


def _hint(name: str, known: Collection[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"only {', '.join(sorted(known))}"


_IN_TERMS_OF_TOML = {
    "model_type": "must be a table",
    "dict_type": "must be a table",
    "tuple_type": "must be a name or a list of names",
    "too_short": "must not be empty",
}


def _complaint(detail: ErrorDetails) -> str:
    # A name alone is read as a list of one; its index would be news to whoever wrote it.
    where = ".".join(_key(part) for part in detail["loc"] if not isinstance(part, int))
    why = _IN_TERMS_OF_TOML.get(detail["type"], detail["msg"].removeprefix("Value error, "))
    return f"{where}: {why[:1].lower()}{why[1:]}" if where else why
