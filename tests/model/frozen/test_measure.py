"""The gain of an int8 layer is measured in both directions, and is none where a product is missing."""

import pytest
import torch

from huarizo.model.frozen import int8, measure

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "MEASURING", 0.01)


def test_both_directions_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    directions = []
    product = int8.int8_product
    monkeypatch.setattr(int8.kernel, "reason_against", lambda dtype: "not in this test")
    monkeypatch.setattr(int8, "int8_product", lambda a, b: directions.append(b.stride()) or product(a, b))
    assert measure.int8_gain(CPU, torch.float32, rows=32, size=64) > 0
    assert set(directions) == {(1, 64), (64, 1)}


def test_a_product_that_fails_gains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")

    monkeypatch.setattr(measure.nn.Linear, "forward", broken)
    assert measure.int8_gain(CPU, torch.float32, rows=32, size=64) == 0
