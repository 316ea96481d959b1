"""Measures how fast a device multiplies, and whether int8 pays there.

Whether it pays is measured by the forward and backward pass of a whole frozen layer, as in training: the products alone
say little, because inputs are rotated and rounded and outputs are scaled and rotated.
"""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from huarizo.kernels import int8 as kernel
from huarizo.machine import DTYPES, MEASURED, MEASURING, FixedPrecision, float_precision, gemm_rate, rate, seconds
from huarizo.model.frozen.int8 import FLOAT_CHANNELS, int8_product, quantise


def product_rates(on: torch.device, budget: float = MEASURING) -> dict[str, float]:
    """`product_rate` by precision, without those that fail."""
    rates: dict[str, float] = {}
    for precision in ("int8", "bf16", "fp16", "fp32"):
        if precision == "fp16" and on.type == "cpu":
            continue
        try:
            rates[precision] = product_rate(precision, on, budget)
        except (RuntimeError, NotImplementedError):
            continue
    return rates


def product_rate(precision: FixedPrecision, on: torch.device, budget: float = MEASURING) -> float:
    """Measure a precision's product: GFLOP/s. int8 by the kernel on a CPU that has one, else as an int8 layer does it.

    Takes about `budget` seconds (`huarizo.machine.rate`).
    """
    if precision != "int8":
        return gemm_rate(precision, on, budget)
    weight, dtype = _integers(MEASURED, on), DTYPES[float_precision(on)]
    if on.type == "cpu" and kernel.reason_against(dtype) is None:
        return rate(_kernel_product(weight, dtype), on, budget)
    return rate(lambda rows: partial(int8_product, _integers(rows, on), weight.t()), on, budget)


def _integers(rows: int, on: torch.device) -> torch.Tensor:
    return torch.randint(-127, 128, (rows, MEASURED), dtype=torch.int8, device=on)


def _kernel_product(weight: torch.Tensor, dtype: torch.dtype) -> Callable[[int], Callable[[], object]]:
    """The kernel's forward product for a number of rows, which are quantised before it is measured."""
    packed, ones = kernel.packed(weight), torch.ones(MEASURED)
    channels = torch.arange(FLOAT_CHANNELS)
    float_weight = kernel.packed(torch.ones(MEASURED, FLOAT_CHANNELS, dtype=dtype))

    def product(rows: int) -> Callable[[], object]:
        x = torch.randn(rows, MEASURED, dtype=dtype)
        quantised = kernel.quantise(x, ones)
        return lambda: kernel.forward(*quantised, packed, ones, x, channels, float_weight, None, MEASURED)

    return product


def int8_gain(on: torch.device, dtype: torch.dtype, rows: int = 4096, size: int = 2048) -> float:
    """How many times as fast an int8 layer [size, size] is as one in `dtype`, for `rows` tokens; 0 if it fails.

    Each is run for MEASURING / 2 seconds, and its fastest run counts.
    """
    linear = nn.Linear(size, size, bias=False, device=on, dtype=dtype).requires_grad_(False)
    try:
        layer = quantise([linear], torch.ones(size, device=on))[0]
        x = torch.randn(rows, size, device=on, dtype=dtype, requires_grad=True)
        return _fastest(linear, x) / _fastest(layer, x)
    except (RuntimeError, NotImplementedError):
        return 0.0


def _fastest(layer: nn.Module, x: torch.Tensor) -> float:
    """Seconds of the fastest forward and backward pass, except the first one, which loads libraries."""

    def step() -> None:
        torch.autograd.grad(layer(x), x, torch.ones_like(x))

    step()
    ends, times = time.perf_counter() + MEASURING / 2, [seconds(step, x.device)]
    while time.perf_counter() < ends:
        times.append(seconds(step, x.device))
    return min(times)
