"""From the catalogue an operator edits to the routes the worker calls."""

from collections.abc import Mapping

from deltafan_config import Catalogue, MissingKey, Settings
from deltafan_config import Route as ConfiguredRoute
from deltafan_worker._route import Route, Timeouts

_ENDPOINTS = {"chat": "/chat/completions"}


class Router:
    """Resolves model names. Keys are read from `env` once, when a provider is first used."""

    def __init__(self, catalogue: Catalogue, settings: Settings, env: Mapping[str, str]) -> None:
        self._catalogue = catalogue
        self._settings = settings
        self._env = env

    def __call__(self, model: str) -> tuple[Route, ...]:
        """The routes to try, in order; providers whose key is not set are passed over while there are others.

        Raises:
            UnknownModel: nobody serves the model.
            MissingKey: no provider's key is set.
        """
        routes: list[Route] = []
        missing: MissingKey | None = None
        for route in self._catalogue.resolve(model):
            try:
                routes.append(self._route(route))
            except MissingKey as error:
                missing = missing or error
        if not routes and missing is not None:
            raise missing
        return tuple(routes)

    def _route(self, route: ConfiguredRoute) -> Route:
        provider = route.provider
        headers = dict(provider.headers)
        if (key := provider.api_key(self._env)) is not None:
            headers["Authorization"] = f"Bearer {key.get_secret_value()}"
        return Route(
            provider=provider.name,
            api=provider.api,
            model=route.model,
            url=provider.base_url + _ENDPOINTS[provider.api],
            headers=headers,
            defaults=route.defaults,
            price=route.price,
            timeouts=self._timeouts(route),
        )

    def _timeouts(self, route: ConfiguredRoute) -> Timeouts:
        own, general = route.timeouts, self._settings
        return Timeouts(
            connect_s=own.connect_s or general.connect_timeout_s,
            first_delta_s=own.first_delta_s or general.first_delta_timeout_s,
            silence_s=own.silence_s or general.silence_timeout_s,
            total_s=own.total_s or general.total_timeout_s,
        )
