"""Measures how fast a device multiplies, and whether int8 pays there.

Whether it pays is measured by the forward and backward pass of all linears of a decoder layer, as in training: the
products alone say little, because inputs are rotated and rounded and outputs are scaled and rotated.
"""

import time
from collections.abc import Callable, Sequence
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
    """How many times as fast a decoder layer's linears are in int8 as in `dtype`, for `rows` tokens; 0 if one fails.

    They have TinyLlama's shapes if the hidden size is 2048. Each kind is run for MEASURING / 2 seconds, and its fastest
    run counts.
    """
    small, large = size // 8, size * 11 // 4
    shapes = (size, size), (size, small), (size, small), (size, size), (size, large), (size, large), (large, size)
    try:
        linears = [nn.Linear(*shape, bias=False, device=on, dtype=dtype).requires_grad_(False) for shape in shapes]
        layers = [quantise([linear], torch.ones(linear.in_features, device=on))[0] for linear in linears]
        inputs = [torch.randn(rows, width, device=on, dtype=dtype, requires_grad=True) for width, _ in shapes]
        return _fastest(linears, inputs) / _fastest(layers, inputs)
    except (RuntimeError, NotImplementedError):
        return 0.0


def _fastest(layers: Sequence[nn.Module], inputs: Sequence[torch.Tensor]) -> float:
    """Seconds of the fastest forward and backward pass, except the first one, which loads libraries and compiles."""

    def step() -> None:
        outputs = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
        torch.autograd.grad(outputs, inputs, [torch.ones_like(output) for output in outputs])

    step()
    ends, times = time.perf_counter() + MEASURING / 2, [seconds(step, inputs[0].device)]
    while time.perf_counter() < ends:
        times.append(seconds(step, inputs[0].device))
    return min(times)
