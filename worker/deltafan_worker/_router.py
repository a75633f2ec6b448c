"""From the catalogue an operator edits to the routes the worker calls."""

from collections.abc import Iterable, Mapping
from functools import lru_cache

from deltafan._errors import DeltafanError
from deltafan_config import Catalogue, MissingKey, Provider, Settings
from deltafan_config import Route as ConfiguredRoute
from deltafan_worker._apis import APIS
from deltafan_worker._route import Continuation, Limits, Route, Timeouts

_MODELS_KNOWN = 1024
"""Jobs may name any model of a provider."""


class UnsupportedApi(DeltafanError):
    """None of a model's providers speaks the API that a request is written for."""

    code = "unsupported_api"

    def __init__(self, model: str, api: str, providers: Iterable[Provider]) -> None:
        spoken = "; ".join(f"{provider.name} speaks {', '.join(provider.apis)}" for provider in providers)
        super().__init__(
            f"model {model[:128]!r} is not served through api={api!r} ({spoken}); "
            "submit with an api that is, or add it to the provider in the catalogue"
        )


class Router:
    """Resolves model names. Keys are read from `env` once, when a provider is first used."""

    def __init__(self, catalogue: Catalogue, settings: Settings, env: Mapping[str, str]) -> None:
        self._catalogue = catalogue
        self._settings = settings
        self._env = env
        # All jobs of a model share its routes.
        self._known = lru_cache(_MODELS_KNOWN)(self._resolve)

    def __call__(self, model: str, api: str) -> tuple[Route, ...]:
        """The routes to try, in order; providers whose key is not set are passed over while there are others.

        Raises:
            UnknownModel: nobody serves the model.
            UnsupportedApi: nobody serves it through this API.
            MissingKey: no provider's key is set.
        """
        return self._known(model, api)

    def _resolve(self, model: str, api: str) -> tuple[Route, ...]:
        configured = self._catalogue.resolve(model)
        speaking = [route for route in configured if api in route.provider.apis]
        if not speaking:
            raise UnsupportedApi(model, api, [route.provider for route in configured])
        routes: list[Route] = []
        missing: MissingKey | None = None
        for route in speaking:
            try:
                routes.append(self._route(route, api))
            except MissingKey as error:
                missing = missing or error
        if not routes and missing is not None:
            raise missing
        return tuple(routes)

    def _route(self, route: ConfiguredRoute, api: str) -> Route:
        provider = route.provider
        url, *others = (provider.base_url + path for path in APIS[api].paths(route.model))
        headers = dict(provider.headers)
        if (key := provider.api_key(self._env)) is not None:
            headers["Authorization"] = f"Bearer {key.get_secret_value()}"
        return Route(
            provider=provider.name,
            api=api,
            model=route.model,
            url=url,
            other_url=others[0] if others else None,
            headers=headers,
            defaults=route.defaults,
            price=route.price,
            continuation=_continuation(provider, api),
            timeouts=self._timeouts(route),
            provider_limits=Limits(**provider.limits.model_dump()),
            limits=Limits(**route.limits.model_dump()),
            max_output_bytes=self._settings.max_output_bytes,
        )

    def _timeouts(self, route: ConfiguredRoute) -> Timeouts:
        own, general = route.timeouts, self._settings
        return Timeouts(
            connect_s=own.connect_s or general.connect_timeout_s,
            first_delta_s=own.first_delta_s or general.first_delta_timeout_s,
            silence_s=own.silence_s or general.silence_timeout_s,
            total_s=own.total_s or general.total_timeout_s,
        )


def _continuation(provider: Provider, api: str) -> Continuation | None:
    """Background is a thing of Responses, the others are of Chat Completions."""
    if api == "responses":
        return "background" if "background" in provider.continuation else None
    if api == "chat":
        return next((way for way in provider.continuation if way != "background"), None)
    return None
