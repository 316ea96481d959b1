"""Runs the cases on a tier, or random shapes under sanitizers, and says how it went."""

import hashlib
import random
import time
from dataclasses import dataclass, field
from types import ModuleType

import torch

from huarizo.kernels.tiers import TIERS, Tier
from tests.tiers import cases
from tests.tiers.drivers import FLAGS, FUNCTIONS, QUICK, SANITIZED, Failure, kernels_of, on, way_of

SEEDS = 20261126


@dataclass
class Outcome:
    """What came of one tier."""

    tier: Tier
    reason: str | None = None
    """Why it was not run."""
    how: str = ""
    failures: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    """Of the results that have the same bytes on every tier, by case."""

    def line(self) -> str:
        result = "not run" if self.reason else "FAILED" if self.failures else "passed"
        return f"{self.tier.name:18}{result:9}{self.reason or self.how}"


def outcome_of(name: str, brief: bool = False) -> Outcome:
    """The cases of a tier, of all its kernels; a few if `brief`."""
    tier = next(tier for tier in TIERS if tier.name == name)
    way = way_of(tier)
    if isinstance(way, str):
        return Outcome(tier, reason=way)
    torch.set_num_threads(1)
    outcome, start, count = Outcome(tier), time.monotonic(), 0
    try:
        with on(tier, way, QUICK if brief else FLAGS):
            for kernel in kernels_of(tier):
                for case in cases.CASES[kernel](brief):
                    _run_case(case, outcome)
                    count += 1
    except Failure as failure:
        outcome.failures.append(str(failure))
    without = [kernel.__name__.rpartition(".")[2] for kernel in FUNCTIONS if kernel not in kernels_of(tier)]
    outcome.how = ", ".join([
        f"emulated by {way.emulation}" if way.emulation else "natively", f"{count} cases",
        *(f"no {kernel}" for kernel in without), f"{time.monotonic() - start:.0f} s",
    ])  # fmt: skip
    return outcome


def _run_case(case: cases.Case, outcome: Outcome) -> None:
    name, (function, arguments) = cases.name_of(case), case
    torch.manual_seed(SEEDS)
    try:
        results = function(*arguments)
    except AssertionError as wrong:
        outcome.failures.append(f"{name}: {wrong}")
        return
    if results:
        content = b"".join(tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in results)
        outcome.digests[name] = hashlib.sha256(content).hexdigest()


def add_differences(outcomes: list[Outcome]) -> None:
    """Add failures for results that differ from those of the lowest tier that ran, a native one if possible."""
    ran = [outcome for outcome in outcomes if outcome.digests]
    if not ran:
        return
    lowest = max(ran, key=lambda outcome: (outcome.how.startswith("natively"), TIERS.index(outcome.tier)))
    for outcome in ran:
        for case, digest in outcome.digests.items():
            if digest != lowest.digests.get(case, digest):
                outcome.failures.append(f"{case}: other bytes than on {lowest.tier.name}")


# ---------------------------------------------------------------------------------------------------------- sanitizers


def sanitized(name: str, shapes: int) -> Outcome:
    """Calls of random shapes, a third of them for each kernel, on programs with sanitizers."""
    tier = next(tier for tier in TIERS if tier.name == name)
    way = way_of(tier)
    if isinstance(way, str) or way.runner:
        return Outcome(tier, reason=way if isinstance(way, str) else f"no sanitizers under {way.emulation}")
    torch.set_num_threads(1)
    torch.manual_seed(SEEDS)
    chance, outcome, start, done = random.Random(SEEDS), Outcome(tier), time.monotonic(), 0
    called = ""
    try:
        with on(tier, way, SANITIZED):
            while done < shapes:
                kernel = kernels_of(tier)[done % len(kernels_of(tier))]
                case = _random_case(kernel, chance)
                called, threads = cases.name_of(case), chance.randint(1, 4)
                torch.set_num_threads(threads)
                case[0](*case[1])
                done += 1
    except Failure as failure:
        outcome.failures.append(f"after {done} shapes, {called}: {failure}")
    finally:
        torch.set_num_threads(1)
    emulated = f" emulated by {way.emulation}," if way.emulation else ""
    outcome.how = f"{done} random shapes,{emulated} {time.monotonic() - start:.0f} s"
    return outcome


def _random_case(kernel: ModuleType, chance: random.Random) -> cases.Case:
    """One of a kernel's calls without a comparison: results may be anything, as long as nothing is touched wrongly."""
    rows, inputs, dtype = chance.randint(0, 40), chance.randint(1, 200), chance.choice(cases.DTYPES)
    if kernel.__name__.endswith("int8"):
        outputs, rank = chance.randint(1, 200), chance.choice((0, chance.randint(1, 40)))
        return cases.int8_results_of, (inputs, outputs, rows, rank, chance.random() < 0.5, dtype)
    if kernel.__name__.endswith("dropout"):
        return cases.dropout_results_of, (rows, inputs, chance.randint(1, 40), dtype)
    kv_heads, lengths = chance.randint(1, 3), [chance.randint(0, 40) for _ in range(chance.randint(0, 4))]
    if chance.random() < 0.02:
        lengths.append(chance.randint(150, 400))  # longer than the blocks of the backward pass
    size = 16 * chance.randint(1, 8)
    rule = chance.choice((0, chance.randint(1, 60))), chance.choice((0.0, 2.0)), chance.random() < 0.5
    return cases.attention_results_of, (kv_heads * chance.randint(1, 3), kv_heads, lengths, size, dtype, rule)
