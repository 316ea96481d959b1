"""Runs the kernels of every tier that this machine can run, natively or emulated, and lists all tiers with the result.

    python -m tests.tiers               the cases on every tier
    python -m tests.tiers --sanitize    random shapes under AddressSanitizer and UndefinedBehaviorSanitizer

The exit code is 1 if a tier failed.
"""

import argparse
import functools
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

from huarizo.kernels.tiers import TIERS
from tests.tiers.run import Outcome, add_differences, outcome_of, sanitized


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.tiers", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tiers", nargs="*", help="names of tiers; all if there are none")
    parser.add_argument("--sanitize", action="store_true", help="random shapes under sanitizers")
    parser.add_argument("--shapes", type=int, default=10_000, help="of --sanitize, for each tier")
    given = parser.parse_args()
    names = [tier.name for tier in TIERS if not given.tiers or tier.name in given.tiers]
    if unknown := set(given.tiers) - set(names):
        parser.error(f"no tier {', '.join(unknown)}; there are {', '.join(tier.name for tier in TIERS)}")
    outcomes = all_outcomes(functools.partial(sanitized, shapes=given.shapes) if given.sanitize else outcome_of, names)
    add_differences(outcomes)
    for outcome in outcomes:
        for failure in outcome.failures:
            print(f"{outcome.tier.name}: {failure}\n")
    for outcome in outcomes:
        print(outcome.line())
    return int(any(outcome.failures for outcome in outcomes))


def all_outcomes(run: Callable[[str], Outcome], names: list[str]) -> list[Outcome]:
    """One process for each core, a tier at a time."""
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(run, names))


if __name__ == "__main__":
    sys.exit(main())
