"""The workers' scripts in the chaos runs: with a server's clock that can be set, and broken where that is asked."""

from dataclasses import replace
from hashlib import sha1

from deltafan import _lua

CLOCK = "chaos:clock"
"""The key that holds by how many seconds the server's clock is wrong. Without it, it is right."""

_CLOCK = f"""
local function chaos_time()
  local time = redis.call('TIME')
  time[1] = time[1] + (redis.call('GET', '{CLOCK}') or 0)
  return time
end
"""

_SAME_ATTEMPT = """
local number = digits(attempt > 0 and attempt or next_attempt(known))
if attempt > 0 then
  redis.call('HSET', STATE, 'status', 'running', 'run', run, 'claim', digits(claim), 'runs', runs + 1)
  return { 'RUN', number, runs + 1, 'fresh' }
end
"""

BREAKS: dict[str, dict[str, list[tuple[str, str]]]] = {
    # A second owner writes into the first one's attempt, and nobody is told to go.
    "fencing": {
        "begin": [
            (
                "local number = digits(next_attempt(known))",
                _SAME_ATTEMPT,
            ),
        ],
        "compare": [
            ("  return { 'FENCED' }", "  return { 'OK', cancel }"),
            ("{ 'HEAL', cancel, top_seq }", "{ 'OK', cancel }"),
        ],
        "finish": [
            ("if state[2] ~= ARGV[1] then return { 'CHECK' } end", ""),
            ("redis.call('XLEN', EVENTS) ~= tonumber(state[3]) + top_seq", "false"),
            ("top_seq ~= seq - 1", "false"),
            ("ARGV[2] .. '-' .. ARGV[3], 'type', ARGV[4]", "ARGV[2] .. '-' .. digits(top_seq + 1), 'type', ARGV[4]"),
        ],
    },
    # What a server lost is never put back, and nobody looks before the end is written.
    "healing": {
        "compare": [
            ("if top_seq < sent then", "if false then"),
            ("return { 'REPLAY', cancel } end\nif", "return { 'OK', cancel } end\nif"),
        ],
        "finish": [
            ("redis.call('XLEN', EVENTS) ~= tonumber(state[3]) + top_seq", "false"),
            ("top_seq ~= seq - 1", "top_seq >= seq"),
        ],
    },
    # A record that is written again is written twice.
    "ledger": {"close": [("redis.call('SADD', KEYS[3], ARGV[i]) == 1", "redis.call('SADD', KEYS[3], ARGV[i]) >= 0")]},
    # Nothing is noted of a call before it is made.
    "bills": {"begin": [("redis.call('HSETNX', STATE, 'u:' .. ARGV[9]", "string.len('u:' .. ARGV[9]")]},
}
"""By what is missing: in each script, what stands in place of what. The worker itself has no such switch."""


def patch_scripts(broken: str | None) -> None:
    """Make `load` give such scripts to whatever is imported from here on."""
    load, changes = _lua.load, BREAKS[broken] if broken else {}

    def patched(script: str, package: str = "deltafan", *, using: tuple[str, ...] = ("common",)) -> _lua.Script:
        loaded = load(script, package, using=using)
        source = loaded.source.decode()
        for old, new in changes.get(script, []):
            if old not in source:
                raise AssertionError(f"{script}.lua has no {old!r} any more")
            source = source.replace(old, new)
        data = (_CLOCK + source.replace("redis.call('TIME')", "chaos_time()")).encode()
        return replace(loaded, source=data, sha=sha1(data, usedforsecurity=False).hexdigest().encode())

    _lua.load = patched  # type: ignore[assignment]
