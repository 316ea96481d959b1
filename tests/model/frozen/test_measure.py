"""Rates are measured of each product as it is used. The gain of an int8 layer is measured in both directions, and is none where a product is missing."""

import pytest
import torch

from huarizo.model.frozen import int8, measure
from tests.cpus import AVX2, NO_COMPILER, pretend

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
    assert set(directions) == {(1, 64), (64, 1), (1, 192), (192, 1)}


def test_the_linears_of_a_decoder_layer_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    monkeypatch.setattr(
        measure, "_fastest", lambda layers, _: shapes.append([(m.in_features, m.out_features) for m in layers]) or 1
    )
    assert measure.int8_gain(CPU, torch.float32, rows=32, size=64) == 1
    assert shapes[0] == shapes[1] == [(64, 64), (64, 8), (64, 8), (64, 64), (64, 176), (64, 176), (176, 64)]


def test_a_product_that_fails_gains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")

    monkeypatch.setattr(measure.nn.Linear, "forward", broken)
    assert measure.int8_gain(CPU, torch.float32, rows=32, size=64) == 0


def test_int8_is_never_left_to_torch_on_a_cpu_that_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, AVX2, NO_COMPILER)
    monkeypatch.setattr(torch.ops.aten, "_int_mm", lambda *_: pytest.fail("takes minutes"))
    rates = measure.product_rates(CPU, budget=0.02)
    assert rates.keys() == {"int8", "bf16", "fp32"} and min(rates.values()) > 0


def test_with_a_kernel_its_own_product_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    pretend(monkeypatch, AVX2)
    monkeypatch.setattr(torch.ops.aten, "_int_mm", lambda *_: pytest.fail("takes minutes"))
    monkeypatch.setattr(int8.kernel, "quantise", lambda x, scale: (x, scale, None))
    monkeypatch.setattr(int8.kernel, "forward", lambda *args: calls.append(args))
    assert measure.product_rate("int8", CPU, budget=0.01) > 0
    assert calls and calls[0][3].dtype == torch.uint8


def test_a_precision_that_a_device_lacks_has_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("addmm_impl_cpu_ not implemented for 'BFloat16'")

    monkeypatch.setattr(measure, "gemm_rate", broken)
    pretend(monkeypatch, AVX2, NO_COMPILER)
    assert measure.product_rates(CPU, budget=0.01).keys() == {"int8"}
