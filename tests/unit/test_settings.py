from dataclasses import astuple
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from deltafan._request import MAX_BODY_BYTES
from deltafan._retention import Retention
from deltafan._url import masked_url
from deltafan_config import Settings, SettingsError, load_settings

MARK = "Xk7qSecret"
"""Nothing that a URL holds by itself, so where it appears a password has leaked."""


def complaints(**variables: str) -> list[str]:
    with pytest.raises(SettingsError) as raised:
        load_settings({f"DELTAFAN_{name}": value for name, value in variables.items()})
    return str(raised.value).splitlines()


# Settings


def test_an_empty_environment_gives_the_defaults() -> None:
    assert load_settings({}).model_dump() == {
        "redis_url": "redis://localhost:6379/0",
        "streams_url": "redis://localhost:6379/0",
        "prefix": "deltafan",
        "models": None,
        "concurrency": 100,
        "processes": 1,
        "lanes": "all",
        "interactive_share": 0.1,
        "batch_share": 0.1,
        "batch_patience_s": 10.0,
        "quota_pause_s": 60.0,
        "lease_s": 8.0,
        "drain_timeout_s": 30.0,
        "max_attempts": 3,
        "stream_ttl_s": 3600.0,
        "result_ttl_s": 86_400.0,
        "queue_ttl_s": 86_400.0,
        "connect_timeout_s": 10.0,
        "first_delta_timeout_s": 300.0,
        "silence_timeout_s": 120.0,
        "total_timeout_s": 3600.0,
        "max_retries": 3,
        "replicas": 0,
        "replicas_timeout_ms": 500,
        "sweep_interval_s": 60.0,
        "ledger_max_records": 1_000_000,
        "max_body_bytes": 8 * 1024 * 1024,
        "max_queued": None,
        "max_output_bytes": 16 * 1024 * 1024,
        "log_level": "info",
        "log_format": "text",
    }


def test_the_library_has_the_same_defaults() -> None:
    assert astuple(load_settings({}).retention) == astuple(Retention())
    assert load_settings({}).max_body_bytes == MAX_BODY_BYTES


def test_every_field_is_read_from_its_variable() -> None:
    wanted = {
        "redis_url": "rediss://cache:6380/1",
        "streams_url": "unix:///run/valkey.sock",
        "prefix": "a.b-c_1",
        "models": Path("models.toml"),
        "concurrency": 7,
        "processes": 2,
        "lanes": "batch",
        "interactive_share": 0.2,
        "batch_share": 0.3,
        "batch_patience_s": 4.5,
        "quota_pause_s": 90.0,
        "lease_s": 2.5,
        "drain_timeout_s": 0.0,
        "max_attempts": 1,
        "stream_ttl_s": 1.5,
        "result_ttl_s": 2.5,
        "queue_ttl_s": 3.5,
        "connect_timeout_s": 0.1,
        "first_delta_timeout_s": 0.2,
        "silence_timeout_s": 0.3,
        "total_timeout_s": 0.4,
        "max_retries": 0,
        "replicas": 1,
        "replicas_timeout_ms": 9,
        "sweep_interval_s": 5.0,
        "ledger_max_records": 1000,
        "max_body_bytes": 1024,
        "max_queued": 5,
        "max_output_bytes": 1025,
        "log_level": "debug",
        "log_format": "json",
    }
    assert wanted.keys() == Settings.model_fields.keys()
    env = {f"DELTAFAN_{name.upper()}": str(value) for name, value in wanted.items()}
    assert load_settings(env).model_dump() == wanted


def test_only_our_variables_are_read() -> None:
    assert load_settings({"CONCURRENCY": "7", "MY_DELTAFAN_PREFIX": "x", "PATH": "/bin"}) == Settings()


def test_blanks_around_a_value_are_ignored_and_an_empty_one_is_not_set() -> None:
    settings = load_settings({"DELTAFAN_REDIS_URL": " redis://h\n", "DELTAFAN_MODELS": "", "DELTAFAN_STREAMS_URL": " "})
    assert (settings.redis_url, settings.streams_url, settings.models) == ("redis://h", "redis://h", None)


def test_streams_live_where_the_queue_does_unless_told_otherwise() -> None:
    env = {"DELTAFAN_REDIS_URL": "redis://queue"}
    assert load_settings(env).streams_url == "redis://queue"
    assert load_settings(env | {"DELTAFAN_STREAMS_URL": "redis://streams"}).streams_url == "redis://streams"


def test_settings_do_not_change_and_survive_a_round_trip() -> None:
    settings = load_settings({"DELTAFAN_REDIS_URL": "redis://:pw@h", "DELTAFAN_PROCESSES": "2"})
    assert Settings.model_validate(settings.model_dump()) == settings
    with pytest.raises(ValidationError):
        settings.processes = 3


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        ("REDIS_URL", "http://h", "must start with redis://, rediss:// or unix://"),
        ("STREAMS_URL", "http://h", "must start with redis://, rediss:// or unix://"),
        ("PREFIX", "a b", "should match pattern"),
        ("PREFIX", "a" * 65, "should match pattern"),
        ("CONCURRENCY", "0", "greater than or equal to 1"),
        ("CONCURRENCY", "many", "valid integer"),
        ("PROCESSES", "0", "greater than or equal to 1"),
        ("LEASE_S", "1.9", "greater than or equal to 2"),
        ("LEASE_S", "301", "less than or equal to 300"),
        ("DRAIN_TIMEOUT_S", "-1", "greater than or equal to 0"),
        ("MAX_ATTEMPTS", "0", "greater than or equal to 1"),
        ("STREAM_TTL_S", "0", "greater than or equal to 0.001"),
        ("RESULT_TTL_S", "2592001", "less than or equal to 2592000"),
        ("QUEUE_TTL_S", "0", "greater than or equal to 0.001"),
        ("CONNECT_TIMEOUT_S", "0", "greater than 0"),
        ("FIRST_DELTA_TIMEOUT_S", "-5", "greater than 0"),
        ("SILENCE_TIMEOUT_S", "nan", "less than or equal to 86400"),
        ("TOTAL_TIMEOUT_S", "3600000", "less than or equal to 86400"),
        ("MAX_RETRIES", "-1", "greater than or equal to 0"),
        ("REPLICAS", "-1", "greater than or equal to 0"),
        ("REPLICAS_TIMEOUT_MS", "0", "greater than or equal to 1"),
        ("LEDGER_MAX_RECORDS", "999", "greater than or equal to 1000"),
        ("MAX_BODY_BYTES", "1023", "greater than or equal to 1024"),
        ("LOG_LEVEL", "INFO", "'debug', 'info', 'warning' or 'error'"),
        ("LOG_FORMAT", "xml", "'text' or 'json'"),
    ],
)
def test_a_refusal_names_the_variable_its_value_and_what_is_allowed(variable: str, value: str, allowed: str) -> None:
    [complaint] = complaints(**{variable: value})
    assert complaint.startswith(f"DELTAFAN_{variable}='{value}': ")
    assert allowed in complaint


def test_a_stream_may_live_as_long_as_the_result_but_no_longer() -> None:
    assert load_settings({"DELTAFAN_STREAM_TTL_S": "60", "DELTAFAN_RESULT_TTL_S": "60"}).retention.stream_ms == 60_000
    assert complaints(STREAM_TTL_S="61", RESULT_TTL_S="60") == [
        "DELTAFAN_RESULT_TTL_S='60': must be at least DELTAFAN_STREAM_TTL_S, which is 61"
    ]
    assert complaints(STREAM_TTL_S="90000") == [
        "DELTAFAN_RESULT_TTL_S is not set, so it is 86400.0: must be at least DELTAFAN_STREAM_TTL_S, which is 90000"
    ]


def test_everything_wrong_is_told_at_once() -> None:
    found = complaints(
        CONCURENCY="5", REDIS_URL="http://h", PROCESSES="x", STREAM_TTL_S="61", RESULT_TTL_S="60", LOG_FORMAT="xml"
    )
    assert [complaint.partition("=")[0].partition(" ")[0] for complaint in found] == [
        "DELTAFAN_CONCURENCY",
        "DELTAFAN_REDIS_URL",
        "DELTAFAN_PROCESSES",
        "DELTAFAN_RESULT_TTL_S",
        "DELTAFAN_LOG_FORMAT",
    ]


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("CONCURENCY", "CONCURRENCY"),
        ("STREAM_URL", "STREAMS_URL"),
        ("MODEL", "MODELS"),
        ("LEASE", "LEASE_S"),
        ("redis_url", "REDIS_URL"),
    ],
)
def test_an_unknown_variable_is_refused_with_the_nearest_name(variable: str, meant: str) -> None:
    assert complaints(**{variable: MARK}) == [f"DELTAFAN_{variable} is not a setting; did you mean DELTAFAN_{meant}?"]


def test_an_unknown_variable_that_is_near_nothing_is_refused_with_all_names() -> None:
    [complaint] = complaints(QQQQ=MARK)
    assert MARK not in complaint
    assert all(f"DELTAFAN_{name.upper()}" in complaint for name in Settings.model_fields)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("redis://h?foo=bar", "'foo' is not an option of such a URL"),
        ("unix:///s?foo=bar", "'foo' is not an option of such a URL"),
        ("redis://h?socket_timeout=abc", "invalid value for 'socket_timeout'"),
        ("rediss://h?ssl_cert_reqs=abc", "invalid SSL Certificate Requirements Flag: abc"),
        ("redis://h/abc", "the number of a database"),
        ("redis://h/-1", "the number of a database"),
        ("redis://:p/w@h", "percent-encode what its password holds"),
    ],
)
def test_a_url_that_no_connection_could_be_made_from_is_refused(url: str, why: str) -> None:
    [complaint] = complaints(STREAMS_URL=url)
    assert why in complaint
    assert "p/w" not in complaint
    assert complaints(REDIS_URL=url) == [complaint.replace("STREAMS_URL", "REDIS_URL")]


@pytest.mark.parametrize("url", ["redis://h", "redis://h/", "redis://h/3?max_connections=5", "unix:///run/a.sock?db=1"])
def test_a_url_as_redis_py_knows_it_is_taken(url: str) -> None:
    assert load_settings({"DELTAFAN_REDIS_URL": url}).redis_url == url


def test_lifetimes_reach_the_library_in_ms() -> None:
    settings = load_settings(
        {"DELTAFAN_STREAM_TTL_S": "1.001", "DELTAFAN_RESULT_TTL_S": "1.001", "DELTAFAN_QUEUE_TTL_S": "0.001"}
    )
    assert settings.retention == Retention(stream_ms=1001, result_ms=1001, queue_ms=1)


@pytest.mark.parametrize(("result_ttl_s", "queue_ttl_s"), [(7200, 3600), (3600, 7200)])
def test_state_outlives_result_and_queue_by_an_hour(result_ttl_s: float, queue_ttl_s: float) -> None:
    assert Settings(result_ttl_s=result_ttl_s, queue_ttl_s=queue_ttl_s).state_ttl_s == 7200 + 3600


# Secrets


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://localhost:6379/0", "redis://localhost:6379/0"),
        ("redis://:pw@host", "redis://:***@host"),
        ("rediss://user:pw@host:6380/1?db=2", "rediss://user:***@host:6380/1?db=2"),
        ("redis://:a@b@host", "redis://:***@host"),
        ("redis://pw@host", "redis://***@host"),
        ("redis://:pw@[::1]:6379", "redis://:***@[::1]:6379"),
        ("redis://host/0?password=pw&db=1", "redis://host/0?***"),
        ("redis://host/0?%70assword=pw", "redis://host/0?***"),
        ("rediss://host/0?ssl_password=pw", "rediss://host/0?***"),
        ("unix:///run/valkey.sock?db=1", "unix:///run/valkey.sock?db=1"),
        ("unix://:pw@/run/valkey.sock", "unix://:***@/run/valkey.sock"),
        ("redis://:p/w@host", "<unreadable URL>"),
        ("redis://:1#w@host", "<unreadable URL>"),
        ("redis://:1?w@host", "<unreadable URL>"),
        ("redis://:p/w", "<unreadable URL>"),
        ("redis://[pw@host", "<unreadable URL>"),
        ("user:pw@host", "<unreadable URL>"),
        ("redis:/:pw@host", "<unreadable URL>"),
        ("pw", "<unreadable URL>"),
        ("", "<unreadable URL>"),
    ],
)
def test_what_is_shown_of_a_url(url: str, shown: str) -> None:
    assert masked_url(url) == shown


secrets = st.tuples(st.text(max_size=6), st.text(max_size=6)).map(MARK.join)
schemes = st.sampled_from(["redis://", "rediss://", "unix://", "http://", "redis:/", "redis:", "://", ""])
places = st.sampled_from(
    [
        "user:{}@host:6379/0",
        ":{}@host/0",
        "{}@host",
        ":{}@/run/valkey.sock",
        "host/0?db=1&password={}",
        "host?password={}",
    ]
)


@given(secret=secrets, scheme=schemes, place=places, escape=st.booleans())
@example(secret=f"/{MARK}", scheme="redis://", place="{}@host", escape=False)
@example(secret=f"1#{MARK}", scheme="redis://", place=":{}@host/0", escape=False)
def test_no_url_shows_its_password(secret: str, scheme: str, place: str, escape: bool) -> None:
    shown = masked_url(scheme + place.format(quote(secret, safe="") if escape else secret))
    assert MARK not in shown


@given(secret=secrets, place=places)
def test_masking_again_changes_nothing(secret: str, place: str) -> None:
    shown = masked_url("redis://" + place.format(quote(secret, safe="")))
    assert masked_url(shown) == shown


@given(
    host=st.from_regex(r"[a-z0-9][a-z0-9.-]{0,20}", fullmatch=True), port=st.integers(1, 65535), db=st.integers(0, 15)
)
def test_a_url_without_a_secret_is_shown_as_it_is(host: str, port: int, db: int) -> None:
    url = f"redis://{host}:{port}/{db}"
    assert masked_url(url) == url


@given(secret=secrets.map(lambda text: quote(text, safe="")))
def test_settings_never_show_a_password(secret: str) -> None:
    url = f"redis://user:{secret}@host/0"
    for settings in (Settings(redis_url=url), Settings(streams_url=f"redis://host/0?password={secret}")):
        assert MARK not in repr(settings) + str(settings) + f"{settings}"
    assert Settings(redis_url=url).redis_url == url


def test_masked_urls_are_shown_in_repr_and_str() -> None:
    settings = Settings(redis_url="redis://:pw@queue", streams_url="redis://:pw@streams")
    for text in (repr(settings), str(settings)):
        assert "redis_url='redis://:***@queue', streams_url='redis://:***@streams', prefix='deltafan'" in text


@pytest.mark.parametrize(
    "url", [f"http://:{MARK}@h", f":{MARK}@h", f"redis:/:{MARK}@h", f"http://h?password={MARK}", MARK]
)
def test_a_refused_url_is_masked_in_the_refusal(url: str) -> None:
    assert MARK not in "".join(complaints(REDIS_URL=url, STREAMS_URL=url))
    with pytest.raises(ValidationError) as raised:
        Settings(redis_url=url)
    assert MARK not in str(raised.value)
