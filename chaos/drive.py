"""Breaks everything under load and compares what every reader has with what the model sent: `make chaos`.

Each scenario starts real servers and three real workers, submits 25 jobs a second of every kind, reads each in several
ways, and hurts all of it again and again: first with each fault alone, then with random mixtures whose faults overlap,
last with builds that are broken on purpose, to show that the harness sees what it is for.

Each scenario is a line of the table:
  faults     that really struck: there was somebody to be hurt
  deltas     as the readers took them, those included that were void later
  lost, dup, disord   deltas that a reader lacks, has twice, has in another order than they were sent
  wrong      readers whose transcript is anything but one whole answer, or an end that the job may have
  2x bill    records in the usage ledger beyond one for each model call
  no bill    model calls without a record, or with one that is not what the provider reported
  spent      readers of jobs that a fault has cost a run which may cost none
  stuck      readers, queue entries and workers that did not come to their end, or readers that were held up for more
             than 10 s by a fault alone, for more than 30 s in a mixture
  recovery   the longest time from a fault to the next event of a reader that waited for one, but for batch jobs, which
             wait for a provider that asks for less

From lost to stuck all is well when it is zero. The exit code is 1 when it is not, when a fault never struck, or when a
build that is broken on purpose shows nothing in the column that is its own.
"""

import logging
import random
import re
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count

import uvloop

from account import COUNTED, WRONG, Account
from faults import FAULTS, Fault
from scenario import run_scenario

ALONE_S = 5.0
"""For so long each fault strikes alone."""
MIXTURE_S = 20.0
IN_A_MIXTURE = 5
BROKEN_S = 6.0
TRIES = 6
"""A fault strikes where it strikes: so many runs may miss the moment that a guard is for."""


@dataclass(frozen=True, slots=True)
class Break:
    """A build that is broken on purpose (scripts.py): which faults show it, and in which columns."""

    name: str
    columns: tuple[str, ...]
    faults: tuple[str, ...]


BREAKS = (
    Break("fencing", ("dup", "disord", "wrong"), ("a worker is frozen and wakes", "two workers get one job")),
    Break("healing", ("lost",), ("a stream is deleted", "the network cuts", "memory runs out")),
    Break("ledger", ("2x bill",), ("a reply is cut in the middle", "the network cuts")),
    Break("bills", ("no bill",), ("a worker is killed",)),
)


class Table:
    """The accounts, printed as they come."""

    def __init__(self) -> None:
        self.total = Account()
        self.never_struck: list[str] = []
        print(f"{'fault':<50}" + "".join(f"{name:>8}" for name in (*COUNTED, *WRONG)) + "  recovery")

    async def run(self, name: str, seed: str, faults: list[Fault], load_s: float) -> None:
        """Run a scenario, print its line and what is wrong, and count it in."""
        account = await run_scenario(f"{seed}/{name}", faults, load_s=load_s)
        self.total.add(account)
        if not account.counts["faults"] and faults != [FAULTS[0]]:
            self.never_struck.append(name)
        print_line(name, account)
        if not account.is_clean:
            print(f"    of: {', '.join(fault.name for fault in faults)}")
        for example in account.examples[:5]:
            print(f"    {example}")


def print_line(name: str, account: Account) -> None:
    """One line of the table."""
    figures = "".join(f"{account.counts[column]:>8,}" for column in (*COUNTED, *WRONG))
    print(f"{name:<50}{figures}{account.recovery_s:>9.1f}s", flush=True)


async def run(minutes: float, seed: str, only: str) -> int:
    """Run everything; 1 when something is wrong, or when a broken build goes unseen."""
    end, table = time.monotonic() + minutes * 60, Table()
    for fault in FAULTS:
        if only in fault.name:
            await table.run(fault.name, seed, [fault], ALONE_S)
    for number in _mixtures(only):
        if not only and time.monotonic() > end:
            break
        name = f"mixture {number}"
        await table.run(name, seed, _mixed(random.Random(f"{seed}/{name}")), MIXTURE_S)
    print_line("all of the above", table.total)
    unseen = [one.name for one in BREAKS if only in one.name and not await _is_seen(one, seed)]
    is_clean = table.total.is_clean and not table.never_struck
    print(f"seed {seed}: {'clean' if is_clean else 'NOT CLEAN'}")
    print(
        f"never struck: {', '.join(table.never_struck) or 'none'}; broken builds unseen: {', '.join(unseen) or 'none'}"
    )
    return 0 if is_clean and not unseen else 1


def _mixtures(only: str) -> Iterable[int]:
    """All of them, or the one that was asked for."""
    asked = re.fullmatch(r"mixture (\d+)", only)
    return (int(asked[1]),) if asked else () if only else count(1)


def _mixed(chance: random.Random) -> list[Fault]:
    """Some faults. Not one after which nothing can be asked of the ledger, and not the one that does nothing."""
    return chance.sample([fault for fault in FAULTS[1:] if not fault.forgets], IN_A_MIXTURE)


async def _is_seen(broken: Break, seed: str) -> bool:
    """Whether the harness sees what is missing, and not only that nothing works."""
    name, faults = f"broken on purpose: {broken.name}", [fault for fault in FAULTS if fault.name in broken.faults]
    for number in range(TRIES):
        account = await run_scenario(f"{seed}/{name}/{number}", faults, load_s=BROKEN_S, broken=broken.name)
        print_line(name, account)
        works = account.completed > account.counts["jobs"] / 2
        if works and any(account.counts[column] for column in broken.columns):
            return True
    return False


def main() -> int:
    """Read the command line."""
    parser = ArgumentParser(
        prog="make chaos", description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--minutes", type=float, default=6.0, help="mixtures are drawn until then (default: 6)")
    parser.add_argument("--seed", default=str(time.time_ns() % 1_000_000), help="draws the same jobs and faults again")
    parser.add_argument("--only", default="", help='lines whose name holds this: "network", "mixture 17", "fencing"')
    args = parser.parse_args()
    names = [*(fault.name for fault in FAULTS), *(one.name for one in BREAKS)]
    if not any(args.only in name for name in names) and not _mixtures(args.only):
        parser.error(f"no line has that name; there are mixture 1, mixture 2 … and {', '.join(names)}")
    logging.disable(logging.WARNING)  # a connection that is lost is no news here
    print(f"seed {args.seed}")
    return uvloop.run(run(args.minutes, args.seed, args.only))


if __name__ == "__main__":
    sys.exit(main())
