"""The model catalogue: which provider serves which model, at what price."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError

from deltafan._errors import DeltafanError

Api = Literal["chat"]
PerMillion = Annotated[float, Field(ge=0)]


class CatalogueError(DeltafanError):
    """The catalogue file can not be used."""

    code = "catalogue_error"


class UnknownModel(DeltafanError):
    """No provider is known for a model."""

    code = "unknown_model"


class MissingKey(DeltafanError):
    """A provider's key is not in the environment."""

    code = "missing_key"


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TimeoutOverrides(_Table):
    """Limits in seconds; what is left out is as in the settings."""

    connect_s: Annotated[float, Field(gt=0)] | None = None
    first_delta_s: Annotated[float, Field(gt=0)] | None = None
    silence_s: Annotated[float, Field(gt=0)] | None = None
    total_s: Annotated[float, Field(gt=0)] | None = None

    def over(self, other: Self) -> Self:
        """Both together; this one wins."""
        return self.model_validate(other.model_dump(exclude_none=True) | self.model_dump(exclude_none=True))


class Price(_Table):
    """Per million tokens. A kind of token without its own price costs what the input or output costs it is part of."""

    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")]
    input: PerMillion
    output: PerMillion
    cached_input: PerMillion | None = None
    cache_write: PerMillion | None = None
    reasoning: PerMillion | None = None


def _base_url(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ValueError("must start with http:// or https://")
    return url.rstrip("/")


class Provider(_Table):
    """An upstream account."""

    name: str
    base_url: Annotated[str, AfterValidator(_base_url)]
    api: Api = "chat"
    api_key_env: str | None = None
    """Name of the variable that holds the key; None: no key is sent."""
    headers: Mapping[str, str] = Field(default_factory=dict, repr=False)
    timeouts: TimeoutOverrides = TimeoutOverrides()

    def api_key(self, env: Mapping[str, str]) -> SecretStr | None:
        """The key, or None where none is needed.

        Raises:
            MissingKey: one is needed and not there.
        """
        if self.api_key_env is None:
            return None
        if not (key := env.get(self.api_key_env, "").strip()):
            raise MissingKey(f"provider {self.name} needs a key: set {self.api_key_env} in the worker's environment")
        return SecretStr(key)


class Model(_Table):
    """A model and who serves it."""

    name: str
    provider: str | tuple[str, ...]
    """One provider or several, tried in order."""
    upstream_name: str | None = None
    """What the provider calls it; None: the same."""
    price: Price | None = None
    defaults: Mapping[str, Any] = Field(default_factory=dict)
    """Goes under the request's body."""
    timeouts: TimeoutOverrides = TimeoutOverrides()

    @property
    def providers(self) -> tuple[str, ...]:
        """Always a tuple."""
        return (self.provider,) if isinstance(self.provider, str) else self.provider


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One provider's way to a model."""

    provider: Provider
    model: str
    """The name the provider knows."""
    price: Price | None = None
    timeouts: TimeoutOverrides = field(default_factory=TimeoutOverrides)
    defaults: Mapping[str, Any] = field(default_factory=dict)


class Catalogue(_Table):
    """All providers and models, by name."""

    providers: Mapping[str, Provider]
    models: Mapping[str, Model] = Field(default_factory=dict)

    @classmethod
    def load(cls, path: Path | None = None) -> Self:
        """Read a catalogue file; without a path, the one that is shipped.

        Raises:
            CatalogueError: it is missing, no TOML, or says something that can not be.
        """
        source = path or shipped()
        try:
            data = tomllib.loads(source.read_text(encoding="utf-8"))
        except OSError as error:
            raise CatalogueError(
                f"{source}: can not be read ({error.strerror}); set DELTAFAN_MODELS to a catalogue"
            ) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise CatalogueError(f"{source}: is not TOML: {error}") from None
        try:
            catalogue = cls.model_validate(_named(data))
        except ValidationError as error:
            raise CatalogueError("\n".join(f"{source}: {_complaint(detail)}" for detail in error.errors())) from None
        catalogue.check_references(source)
        return catalogue

    def resolve(self, model: str) -> tuple[Route, ...]:
        """The ways to a model, in the order to try them. `provider/model` leads to one that is not listed.

        Raises:
            UnknownModel: neither a listed model nor `provider/model` with a provider that is.
        """
        if (entry := self.models.get(model)) is not None:
            return tuple(self._route(self.providers[name], entry) for name in entry.providers)
        name, slash, rest = model.partition("/")
        if slash and rest and name in self.providers:
            provider = self.providers[name]
            return (Route(provider=provider, model=rest, timeouts=provider.timeouts),)
        near = get_close_matches(model, self.models, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`deltafan models` lists what there is"
        raise UnknownModel(f"model {model[:128]!r} is not in the catalogue; {hint} Or address it as provider/model.")

    def _route(self, provider: Provider, model: Model) -> Route:
        return Route(
            provider=provider,
            model=model.upstream_name or model.name,
            price=model.price,
            timeouts=model.timeouts.over(provider.timeouts),
            defaults=model.defaults,
        )

    def check_references(self, source: object) -> None:
        """Raise CatalogueError when a model names a provider that is not there."""
        for model in self.models.values():
            for name in model.providers:
                if name not in self.providers:
                    near = get_close_matches(name, self.providers, n=1)
                    hint = f"; did you mean {near[0]}?" if near else ""
                    raise CatalogueError(f"{source}: models.{model.name}: no provider is called {name!r}{hint}")


def shipped() -> Path:
    """The catalogue inside the installed package or, in a checkout, the file beside it that it is made from."""
    inside = Path(str(files("deltafan_config"))) / "models.toml"
    return inside if inside.exists() else inside.parent.parent / "models.toml"


def _named(data: Mapping[str, Any]) -> dict[str, Any]:
    """The file's tables with each entry's own name put into it."""
    tables = dict(data)
    for kind in ("providers", "models"):
        entries = tables.get(kind)
        if isinstance(entries, Mapping):
            tables[kind] = {
                name: {**entry, "name": name} if isinstance(entry, Mapping) else entry
                for name, entry in entries.items()
            }
    return tables


def _complaint(detail: Any) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"{where}: is not known here"
    return f"{where}: {str(detail['msg']).removeprefix('Value error, ')}"
