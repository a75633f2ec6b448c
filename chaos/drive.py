"""Breaks everything under load and compares what every reader has with what the model sent: `make chaos`.

Each fault alone, then random mixtures, then the deliberately broken builds, which the harness must see. Every run has a
seed; the same seed draws the same faults at the same jobs, though not at the same microsecond.
"""

import logging
import random
import sys
import time
from argparse import ArgumentParser

import uvloop

from faults import FAULTS, Fault
from scenario import Account, run_scenario

COLUMNS = ("runs", "faults", "jobs", "deltas", "lost", "dup", "disord", "wrong", "2x bill", "no bill", "silence")
BREAKS = {
    "fencing": ("a worker is frozen and wakes", "two workers get one job"),
    "healing": ("a stream is deleted", "the network cuts", "memory runs out"),
    "ledger": ("a reply is cut in the middle", "the network cuts"),
}
"""Which faults show that a guard is missing."""
TRIES = 6
"""A fault strikes where it strikes: so many runs may miss the moment that a guard is for."""


class Table:
    """The accounts, printed as they come."""

    def __init__(self) -> None:
        self.total = Account()
        self._number = 0
        print(f"{'fault':<50}" + "".join(f"{name:>9}" for name in COLUMNS))

    async def run(self, name: str, seed: str, faults: list[Fault], load_s: float, broken: str | None = None) -> Account:
        """Run a scenario and print its line; a broken build's counts for itself."""
        account = await run_scenario(seed, faults, load_s=load_s, broken=broken, first_number=self._number)
        self._number += account.jobs
        if broken is None:
            self.total.add(account)
        _print(name, account)
        for example in account.examples[:3] if broken is None else ():
            print(f"    {example}")
        return account


def _print(name: str, account: Account) -> None:
    verdict = account.verdict
    figures = [account.runs, account.faults, account.jobs, account.deltas, verdict.lost, verdict.duplicated]
    figures += [verdict.disordered, verdict.wrong, account.double_billed, account.unbilled]
    line = "".join(f"{figure:>9,}" for figure in figures)
    print(f"{name:<50}{line}{account.worst_silence_s:>8.1f}s", flush=True)


async def run(minutes: float, seed: int, only: str | None) -> int:
    """Run everything; 1 when something is wrong, or when a broken build goes unseen."""
    end, table, chance = time.monotonic() + minutes * 60, Table(), random.Random(seed)
    chosen = [fault for fault in FAULTS if only is None or only in fault.name]
    for fault in chosen:
        await table.run(fault.name, f"{seed}/{fault.name}", [fault], 8.0)
    mixable = [fault for fault in chosen if not fault.forgets]
    mixture = 0
    while time.monotonic() < end:
        mixture += 1
        faults = chance.sample(mixable, min(len(mixable), 4))
        await table.run(f"mixture {mixture}", f"{seed}/{mixture}", faults, 12.0)
    _print("all of the above", table.total)
    unseen = 0
    for broken, names in BREAKS.items() if only is None else ():
        faults = [fault for fault in FAULTS if fault.name in names]
        unseen += not await _is_seen(table, seed, broken, faults)
    print(f"seed {seed}: {'clean' if table.total.is_clean else 'NOT CLEAN'}; broken builds unseen: {unseen}")
    return 0 if table.total.is_clean and not unseen else 1


async def _is_seen(table: Table, seed: int, broken: str, faults: list[Fault]) -> bool:
    for number in range(TRIES):
        account = await table.run(f"broken on purpose: {broken}", f"{seed}/{broken}/{number}", faults, 8.0, broken)
        if not account.is_clean:
            return True
    return False


def main() -> int:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=6.0, help="mixtures are drawn until then")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    parser.add_argument("--only", help="faults whose name holds this")
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # a connection that is lost is no news here
    print(f"seed {args.seed}")
    return uvloop.run(run(args.minutes, args.seed, args.only))


if __name__ == "__main__":
    sys.exit(main())
