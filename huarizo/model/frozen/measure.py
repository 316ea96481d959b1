"""Measures whether int8 pays on a device: the forward and backward pass of a whole frozen layer, as in training.

The products alone say little, because inputs are rotated and rounded and outputs are scaled and rotated.
"""

import time

import torch
from torch import nn

from huarizo.machine import MEASURING, seconds
from huarizo.model.frozen.int8 import quantise


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
