"""A worker process of the chaos runs: `python chaos/worker.py [--break fencing|healing|ledger]`.

A break takes one of the protocol's guards out of this process's scripts, to show that the harness sees what happens
then. It exists here only: the worker itself has no such switch.
"""

import os
from argparse import ArgumentParser
from dataclasses import replace
from hashlib import sha1

from deltafan import _lua
from deltafan_config import load_settings

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
}


def break_scripts(name: str) -> None:
    """Make `load` give broken scripts to whatever is imported from here on."""
    load = _lua.load

    def broken(script: str, package: str = "deltafan", *, using: tuple[str, ...] = ("common",)) -> _lua.Script:
        loaded = load(script, package, using=using)
        source = loaded.source.decode()
        for old, new in BREAKS[name].get(script, []):
            if old not in source:
                raise AssertionError(f"{script}.lua has no {old!r} any more")
            source = source.replace(old, new)
        data = source.encode()
        return replace(loaded, source=data, sha=sha1(data, usedforsecurity=False).hexdigest().encode())

    _lua.load = broken  # type: ignore[assignment]


def main() -> None:
    """Run a worker until it is stopped."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--break", dest="broken", choices=BREAKS)
    if broken := parser.parse_args().broken:
        break_scripts(broken)
    from deltafan_worker.main import run_worker  # noqa: PLC0415  behind the patch

    run_worker(load_settings(os.environ), os.environ)


if __name__ == "__main__":
    main()
