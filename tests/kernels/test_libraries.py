"""The kernels of a precision, compiled at once."""

import threading

import pytest

from huarizo.kernels import attention, dropout, int8
from huarizo.kernels.libraries import libraries


def test_int8_is_compiled_for_an_int8_base_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kernel in {"attention": attention, "dropout": dropout, "int8": int8}.items():
        monkeypatch.setattr(kernel, "library", lambda name=name: f"no {name}")
    assert libraries("fp32") == {"attention": "no attention", "dropout": "no dropout"}
    assert libraries("int8") == {"attention": "no attention", "dropout": "no dropout", "int8": "no int8"}


def test_they_are_compiled_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(3)

    def library() -> str:
        together.wait(10)
        return "no compiler"

    for kernel in (attention, dropout, int8):
        monkeypatch.setattr(kernel, "library", library)
    assert set(libraries("int8").values()) == {"no compiler"}
