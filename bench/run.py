"""Measures the budgets: `python bench/run.py [name …]`. Ends with code 1 when one is missed.

Figures are of this machine and this hour; the ratios, taken within one run, are what can be compared.
"""

import importlib
import os
import platform
import sys

import uvloop

from measure import Report, servers

NAMES = ("cpu", "decode", "pickup", "starvation", "recovery", "endings", "submit", "latency", "replay", "memory")
LONG = ("batch", "lanes", "limits")
"""Only when they are named: they take minutes."""


def main() -> int:
    """Run the benchmarks named on the command line, or all but the long ones."""
    names = sys.argv[1:] or NAMES
    if unknown := [name for name in names if name not in NAMES + LONG]:
        print(f"no benchmark is called {', '.join(unknown)}; there are: {', '.join(NAMES + LONG)}", file=sys.stderr)
        return 2
    print(f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}")
    report = Report()
    for name in names:
        module = importlib.import_module(name)
        print(f"{name}: {(module.__doc__ or '').splitlines()[0]}", flush=True)
        with servers() as bench:
            uvloop.run(module.run(bench, report))
    missed = sum(not met for *_, met in report.rows)
    print(f"{len(report.rows) - missed} of {len(report.rows)} budgets met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
