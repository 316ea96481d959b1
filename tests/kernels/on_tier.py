"""A fixture that runs a test once on every tier of this CPU, with the kernels compiled for it."""

from collections.abc import Iterator

import pytest

from huarizo.kernels import attention, build, dropout, int8
from huarizo.kernels.tiers import Tier, tiers

CACHES = (build.load, attention.reason_against, dropout.reason_against, int8.reason_against)


def _clear() -> None:
    for cached in CACHES:
        cached.cache_clear()


@pytest.fixture(params=tiers(), ids=lambda tier: tier.name)
def each_tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tier]:
    """One tier of this CPU, as if it were its only one; tests are skipped on a CPU that has none."""
    monkeypatch.setattr(build, "tiers", lambda: (request.param,))
    _clear()
    yield request.param
    _clear()
