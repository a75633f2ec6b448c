import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltafan import DeltafanError
from deltafan_config import (
    Catalogue,
    CatalogueError,
    MissingKey,
    Model,
    Price,
    Provider,
    TimeoutOverrides,
    UnknownModel,
)
from deltafan_config import _catalogue as module

SHIPPED = Path(__file__).parents[2] / "config" / "models.toml"

PROVIDERS = """
[providers.one]
base_url = "https://one.example/v1"
[providers.two]
base_url = "https://two.example/v1"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "models.toml"


def load(file: Path, text: str) -> Catalogue:
    file.write_text(text, encoding="utf-8")
    return Catalogue.load(file)


def complaints(file: Path, text: str) -> list[str]:
    """Without the file's name, with which each of them begins."""
    with pytest.raises(CatalogueError) as raised:
        load(file, text)
    lines = str(raised.value).splitlines()
    assert [line for line in lines if not line.startswith(f"{file}: ")] == []
    return [line.removeprefix(f"{file}: ") for line in lines]


# Reading


def test_a_provider_and_a_model_with_everything(file: Path) -> None:
    catalogue = load(
        file,
        """
        [providers.one]
        base_url = "https://one.example/v1/"
        api = "chat"
        api_key_env = "ONE_KEY"
        headers = { X-Team = "a" }
        timeouts = { connect_s = 1, first_delta_s = 2.5 }
        [models."m.1"]
        provider = "one"
        upstream_name = "m-one"
        price = { currency = "USD", input = 1, cached_input = 0.5, cache_write = 2, output = 3, reasoning = 4 }
        max_output_tokens = 10
        context_tokens = 20
        defaults = { temperature = 0.5, stop = ["x"] }
        timeouts = { first_delta_s = 600 }
        """,
    )
    provider = Provider(
        name="one",
        base_url="https://one.example/v1",
        api_key_env="ONE_KEY",
        headers={"X-Team": "a"},
        timeouts=TimeoutOverrides(connect_s=1, first_delta_s=2.5),
    )
    model = catalogue.models["m.1"]
    assert catalogue.providers == {"one": provider}
    assert (model.name, model.providers, model.upstream_name) == ("m.1", ("one",), "m-one")
    assert (model.max_output_tokens, model.context_tokens) == (10, 20)
    assert model.price == Price(currency="USD", input=1, cached_input=0.5, cache_write=2, output=3, reasoning=4)
    assert model.defaults == {"temperature": 0.5, "stop": ["x"]}
    assert model.timeouts == TimeoutOverrides(first_delta_s=600)


def test_what_is_left_out_has_its_default(file: Path) -> None:
    catalogue = load(
        file, PROVIDERS + '[models.m]\nprovider = "one"\nprice = {currency = "CNY", input = 0, output = 1}'
    )
    provider, model = catalogue.providers["one"], catalogue.models["m"]
    assert (provider.apis, provider.api_key_env, provider.headers) == (("chat",), None, {})
    assert (model.upstream_name, model.max_output_tokens, model.context_tokens, model.defaults) == (
        None,
        None,
        None,
        {},
    )
    assert model.price is not None
    assert (model.price.cached_input, model.price.cache_write, model.price.reasoning) == (None, None, None)
    assert provider.timeouts == model.timeouts == TimeoutOverrides()


def test_models_are_optional(file: Path) -> None:
    assert load(file, PROVIDERS).models == {}


@pytest.mark.parametrize(
    ("url", "normalised"),
    [
        ("http://h", "http://h"),
        ("https://h/", "https://h"),
        ("https://h:8443/a/v1//", "https://h:8443/a/v1"),
        ("http://[::1]:80/v1", "http://[::1]:80/v1"),
    ],
)
def test_slashes_at_the_end_of_a_base_url_are_dropped(url: str, normalised: str) -> None:
    assert Provider(name="p", base_url=url).base_url == normalised


def test_a_catalogue_that_is_not_there_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CatalogueError) as raised:
        Catalogue.load(tmp_path / "none.toml")
    assert str(raised.value).startswith(
        f"{tmp_path / 'none.toml'}: can not be read (No such file or directory); set DELTA"
    )


@pytest.mark.parametrize("content", [b"[providers", b"\xff"])
def test_what_is_no_toml_is_refused(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(CatalogueError, match=r"models\.toml: is not TOML: "):
        Catalogue.load(file)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "providers: field required"),
        ("provider = 1", "there is no provider here, did you mean providers?"),
        ("[providers]\none = 1", "providers.one: must be a table"),
        ("providers = 1", "providers: must be a table"),
        ("[providers.one]", "providers.one.base_url: field required"),
        ('[providers."a/b"]\nbase_url = "http://h"', 'providers."a/b".name: string should match pattern'),
        ('[providers.one]\nbase_url = "ftp://h"', "providers.one.base_url: must be a http:// or https:// URL"),
        ('[providers.one]\nbase_url = "http://"', "providers.one.base_url: must be a http:// or https:// URL"),
        ('[providers.one]\nbase_url = "http://h/v1?v=1"', "providers.one.base_url: must end with its path"),
        ('[providers.one]\nbase_url = "http://h/v1#a"', "providers.one.base_url: must end with its path"),
        ('[providers.one]\nname = "x"', "providers: one has its name already"),
        (
            PROVIDERS + "[providers.one.timeouts]\ntotal_s = 0",
            "providers.one.timeouts.total_s: input should be greater",
        ),
        (PROVIDERS + "[models.m]", "models.m.provider: field required"),
        (PROVIDERS + "[models.m]\nprovider = []", "models.m.provider: must not be empty"),
        (PROVIDERS + "[models.m]\nprovider = 3", "models.m.provider: must be a name or a list of names"),
        (PROVIDERS + "[models.m]\nprovider = [1]", "models.m.provider: input should be a valid string"),
        (PROVIDERS + '[models.""]\nprovider = "one"', 'models."".name: string should have at least 1 character'),
        (PROVIDERS + '[models.m]\nprovider = "one"\nname = "x"', "models: m has its name already; what a model is"),
        (PROVIDERS + '[models.m]\nprovider = "tow"', "models: m has no provider tow, did you mean two?"),
        (PROVIDERS + '[models."m.1"]\nprovider = ["one", "x"]', 'models: "m.1" has no provider x, only one, two'),
    ],
)
def test_a_refusal_names_file_table_and_reason(file: Path, text: str, complaint: str) -> None:
    [found] = complaints(file, text)
    assert found.startswith(complaint)


@pytest.mark.parametrize(
    ("text", "where", "hint"),
    [
        ('[providers.three]\nbase_url = "http://h"\napi_key = "x"', "providers.three", "did you mean api_key_env?"),
        ('[models."m.1"]\nprovidr = "one"', 'models."m.1"', "did you mean provider?"),
        ('[models.m]\nproviders = ["one"]', "models.m", "did you mean provider?"),
        ('[models.m]\nprovider = "one"\nprice = { inptu = 1 }', "models.m.price", "did you mean input?"),
        ('[models.m]\nprovider = "one"\ntimeouts = { total = 1 }', "models.m.timeouts", "did you mean total_s?"),
        (
            '[models.m]\nprovider = "one"\nprice = { q = 1 }',
            "models.m.price",
            "only cache_write, cached_input, currency, ",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(file: Path, text: str, where: str, hint: str) -> None:
    [found] = complaints(file, PROVIDERS + text)
    assert found.startswith(f"{where}: there is no ")
    assert f" here, {hint}" in found


@pytest.mark.parametrize("value", ["-0.1", "nan", "inf", "true", '"0.4"'])
@pytest.mark.parametrize("kind", ["input", "cached_input", "cache_write", "output", "reasoning"])
def test_a_price_is_a_number_of_at_least_zero(file: Path, kind: str, value: str) -> None:
    prices = {"currency": '"USD"', "input": "1", "output": "1", kind: value}
    table = ", ".join(f"{name} = {price}" for name, price in prices.items())
    [found] = complaints(file, f'{PROVIDERS}[models.m]\nprovider = "one"\nprice = {{ {table} }}')
    assert found.startswith(f"models.m.price.{kind}: input should be")


def test_everything_wrong_is_told_at_once(file: Path) -> None:
    found = complaints(
        file,
        '[providers.one]\nbase_url = "x"\napi = "soap"\n'
        '[models.a]\nprovider = "one"\nprice = { currency = "usd", input = 1 }\n[models.b]\nprvider = "one"',
    )
    assert [complaint.split(": ")[0] for complaint in found] == [
        "providers.one.base_url",
        "providers.one.api",
        "models.a.price.currency",
        "models.a.price.output",
        "models.b",
    ]


def test_models_are_not_blamed_for_refused_providers(file: Path) -> None:
    [found] = complaints(file, '[providers.one]\nbase_url = "x"\n[models.m]\nprovider = "one"')
    assert found.startswith("providers.one.base_url: ")


def test_all_missing_providers_are_told_at_once(file: Path) -> None:
    [found] = complaints(file, PROVIDERS + '[models.a]\nprovider = ["x", "one", "y"]\n[models.b]\nprovider = "z"')
    assert [part.split(",")[0] for part in found.removeprefix("models: ").split("; ")] == [
        "a has no provider x",
        "a has no provider y",
        "b has no provider z",
    ]


# Secrets


@pytest.mark.parametrize(
    "line",
    [
        'base_url = "http://user:hunter2@h"',
        'base_url = "http://h"\napi_key_env = "sk-hunter2"',
        'base_url = "http://h"\napi_key_env = "hunter2"',
        'base_url = "http://h"\nheaders = { Authorization = ["hunter2"] }',
        'base_url = "http://h"\napi_key = "hunter2"',
    ],
)
def test_a_secret_in_the_wrong_place_is_refused_and_not_shown(file: Path, line: str) -> None:
    [found] = complaints(file, f"[providers.one]\n{line}")
    assert "hunter2" not in found


def test_headers_are_not_in_the_repr() -> None:
    provider = Provider(name="p", base_url="http://h", headers={"Authorization": "hunter2"})
    assert "hunter2" not in repr(provider) + str(provider)


def test_the_key_comes_from_the_environment_and_is_not_shown() -> None:
    provider = Provider(name="p", base_url="http://h", api_key_env="P_KEY")
    key = provider.api_key({"P_KEY": " hunter2\n"})
    assert key is not None
    assert key.get_secret_value() == "hunter2"
    assert "hunter2" not in repr(key) + str(key)


def test_a_provider_that_needs_no_key_gets_none() -> None:
    assert Provider(name="p", base_url="http://h").api_key({"P_KEY": "x", "": "x"}) is None


@pytest.mark.parametrize("env", [{}, {"P_KEY": ""}, {"P_KEY": " "}, {"p_key": "x"}])
def test_a_missing_key_is_named(env: dict[str, str]) -> None:
    with pytest.raises(MissingKey, match="provider p needs a key: set P_KEY in"):
        Provider(name="p", base_url="http://h", api_key_env="P_KEY").api_key(env)


def test_errors_have_the_common_root_and_codes_of_their_own() -> None:
    errors: list[type[DeltafanError]] = [CatalogueError, MissingKey, UnknownModel]
    assert [error.code for error in errors] == ["catalogue_error", "missing_key", "unknown_model"]


# Resolving


def catalogue_of(*models: dict[str, Any], providers: tuple[str, ...] = ("one", "two")) -> Catalogue:
    return Catalogue.model_validate(
        {
            "providers": {name: {"base_url": f"https://{name}.example"} for name in providers},
            "models": {model.pop("name"): model for model in models},
        }
    )


def test_providers_are_tried_in_the_order_of_the_list() -> None:
    catalogue = catalogue_of({"name": "m", "provider": ["two", "one"], "upstream_name": "n"})
    assert [(route.provider.name, route.model) for route in catalogue.resolve("m")] == [("two", "n"), ("one", "n")]


def test_a_route_carries_what_the_model_says() -> None:
    price: dict[str, Any] = {"currency": "USD", "input": 1.0, "output": 2.0}
    [route] = catalogue_of({"name": "m", "provider": "one", "price": price, "defaults": {"top_p": 0.5}}).resolve("m")
    assert (route.model, route.price, route.defaults) == ("m", Price(**price), {"top_p": 0.5})


def test_a_models_timeouts_go_over_its_providers() -> None:
    catalogue = Catalogue(
        providers={"p": Provider(name="p", base_url="http://h", timeouts=TimeoutOverrides(connect_s=1, silence_s=2))},
        models={"m": Model(name="m", provider=("p",), timeouts=TimeoutOverrides(silence_s=3, total_s=4))},
    )
    assert catalogue.resolve("m")[0].timeouts == TimeoutOverrides(connect_s=1, silence_s=3, total_s=4)
    assert catalogue.resolve("p/m")[0].timeouts == TimeoutOverrides(connect_s=1, silence_s=2)


def test_a_listed_name_with_a_slash_wins() -> None:
    catalogue = catalogue_of({"name": "one/m", "provider": "two"})
    assert [(route.provider.name, route.model) for route in catalogue.resolve("one/m")] == [("two", "one/m")]


@pytest.mark.parametrize("model", ["", "zzz", "one", "one/", "/m", "zzz/m", "ONE/m"])
def test_what_nobody_serves_is_an_error_with_the_way_to_address_it(model: str) -> None:
    with pytest.raises(UnknownModel, match="addressed as provider/model") as raised:
        catalogue_of({"name": "qwen-plus", "provider": "one"}).resolve(model)
    assert raised.value.model == model


@pytest.mark.parametrize(
    ("model", "hint"),
    [
        ("qwen-pls", "did you mean qwen-plus?"),
        ("oen/llama", "did you mean one/llama?"),
        ("zzz", "`deltafan models` lists what there is."),
    ],
)
def test_an_unknown_model_is_answered_with_the_nearest_names(model: str, hint: str) -> None:
    with pytest.raises(UnknownModel) as raised:
        catalogue_of({"name": "qwen-plus", "provider": "one"}).resolve(model)
    assert f"model {model!r} is not in the catalogue; {hint} " in str(raised.value)


def test_a_very_long_name_is_not_repeated_whole() -> None:
    with pytest.raises(UnknownModel) as raised:
        catalogue_of().resolve("x" * 5000)
    assert len(str(raised.value)) < 400


provider_names = st.from_regex(r"[A-Za-z0-9_.-]{1,8}", fullmatch=True)
model_names = st.text("ab/-.é", min_size=1, max_size=12)


@given(provider=provider_names, model=model_names)
def test_provider_slash_model_leads_to_that_model_of_that_provider(provider: str, model: str) -> None:
    [route] = catalogue_of(providers=(provider,)).resolve(f"{provider}/{model}")
    assert (route.provider.name, route.model, route.price, route.defaults) == (provider, model, None, {})


@given(served=st.dictionaries(model_names, st.lists(st.sampled_from("ab"), min_size=1, max_size=3), max_size=6))
def test_every_listed_model_resolves_to_itself(served: dict[str, list[str]]) -> None:
    catalogue = catalogue_of(
        *({"name": name, "provider": providers} for name, providers in served.items()), providers=("a", "b")
    )
    for name, providers in served.items():
        assert [(route.provider.name, route.model) for route in catalogue.resolve(name)] == [
            (p, name) for p in providers
        ]


@given(model=st.text(max_size=300))
def test_any_text_resolves_or_is_unknown(model: str) -> None:
    try:
        routes = catalogue_of({"name": "m", "provider": "one"}).resolve(model)
    except UnknownModel:
        return
    assert routes


@given(
    upper=st.fixed_dictionaries({}, optional={n: st.floats(0.1, 9) for n in TimeoutOverrides.model_fields}),
    lower=st.fixed_dictionaries({}, optional={n: st.floats(0.1, 9) for n in TimeoutOverrides.model_fields}),
)
def test_overrides_merge_like_dictionaries(upper: dict[str, float], lower: dict[str, float]) -> None:
    merged = TimeoutOverrides(**upper).over(TimeoutOverrides(**lower))
    assert merged.model_dump(exclude_none=True) == lower | upper


# The file that is shipped


def test_the_shipped_catalogue_is_found_in_a_checkout() -> None:
    assert Catalogue.load() == Catalogue.load(SHIPPED)


def test_inside_a_wheel_the_catalogue_lies_in_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "deltafan_config"
    package.mkdir()
    monkeypatch.setattr(module, "__file__", str(package / "_catalogue.py"))
    assert module.shipped() == tmp_path / "models.toml"
    (package / "models.toml").touch()
    assert module.shipped() == package / "models.toml"


def test_every_shipped_model_resolves_and_every_provider_is_reachable() -> None:
    catalogue = Catalogue.load()
    assert {"qwen3.6-plus", "gpt-4o-mini", "smollm2"} <= catalogue.models.keys()
    assert all(catalogue.resolve(name) for name in catalogue.models)
    assert all(catalogue.resolve(f"{name}/any/model") for name in catalogue.providers)


def test_shipped_providers_ask_for_the_keys_that_their_own_sdks_read() -> None:
    providers = Catalogue.load().providers
    assert {name: provider.api_key_env for name, provider in providers.items()} == {
        "openai": "OPENAI_API_KEY",
        "dashscope": "DASHSCOPE_API_KEY",
        "dashscope-cn": "DASHSCOPE_API_KEY",
        "dashscope-native": "DASHSCOPE_API_KEY",
        "dashscope-native-cn": "DASHSCOPE_API_KEY",
        "deepseek": "DEEPSEEK_API_KEY",
        "deepseek-beta": "DEEPSEEK_API_KEY",
        "local": None,
    }


def test_shipped_prices_are_dated_and_cached_input_is_no_dearer() -> None:
    text = SHIPPED.read_text(encoding="utf-8")
    assert "as known in November 2026" in text
    prices = [Price(**model["price"]) for model in tomllib.loads(text)["models"].values() if "price" in model]
    assert prices
    assert all(price.cached_input is None or price.cached_input <= price.input <= price.output for price in prices)


def test_compose_passes_on_every_key_that_the_shipped_catalogue_asks_for() -> None:
    passed = (Path(__file__).parents[2] / "docker-compose.yml").read_text().splitlines()
    asked = {provider.api_key_env for provider in Catalogue.load().providers.values()} - {None}
    assert {"OPENAI_API_KEY", "DASHSCOPE_API_KEY", "DEEPSEEK_API_KEY"} <= asked
    assert {f"      {variable}:" for variable in asked} <= set(passed)
