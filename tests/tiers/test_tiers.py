"""Every tier of the kernels that this machine can run, natively or emulated, on a few cases; `make tiers` runs them all."""

import pytest

from huarizo.kernels import dropout
from huarizo.kernels.tiers import TIERS, tiers
from tests.tiers import cases, drivers
from tests.tiers.cases import dropout_cases
from tests.tiers.drivers import FUNCTIONS, Driver, Failure, way_of
from tests.tiers.run import Outcome, add_differences, outcome_of

NAMES = [tier.name for tier in TIERS]


@pytest.fixture(scope="module")
def lowest() -> Outcome:
    """The lowest tier of this CPU."""
    if not tiers():
        pytest.skip("this CPU has none of the tiers")
    return outcome_of(tiers()[-1].name, brief=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_tier_equals_the_references_and_the_lowest_one(name: str, lowest: Outcome) -> None:
    outcome = lowest if name == lowest.tier.name else outcome_of(name, brief=True)
    if outcome.reason:
        pytest.skip(f"{name} was not run: {outcome.reason}")
    add_differences([outcome, lowest])
    assert not outcome.failures


def test_a_missing_emulator_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = drivers.shutil.which
    monkeypatch.setattr(drivers.shutil, "which", lambda name: None if "aarch64" in name else found(name))
    for tier in TIERS:
        if tier.machine == "aarch64" and tier not in tiers():
            assert "apt install gcc-aarch64-linux-gnu qemu-user" in str(way_of(tier))


def test_a_wrong_result_and_other_bytes_are_failures(lowest: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(iter(lowest.digests))
    other = Outcome(lowest.tier, how="emulated", digests={**lowest.digests, case: "0"})
    add_differences([lowest, other])
    assert other.failures == [f"{case}: other bytes than on {lowest.tier.name}"] and not lowest.failures
    monkeypatch.setattr(cases, "DROPOUT", dict.fromkeys(cases.DTYPES, 0.0))  # nothing is that near
    monkeypatch.setattr(cases, "CASES", {kernel: lambda brief: [] for kernel in FUNCTIONS} | {dropout: dropout_cases})
    assert any(
        "dropout_equals_the_reference" in failure for failure in outcome_of(lowest.tier.name, brief=True).failures
    )


def test_a_program_that_ends_is_a_failure() -> None:
    with pytest.raises(Failure, match="the program ended with 0"):
        Driver(["true"], FUNCTIONS[dropout], dropout.Call)
