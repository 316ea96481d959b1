"""Milliseconds of the linear layers of a decoder layer of TinyLlama's shape on an NVIDIA GPU, forward and backward.

    python benchmarks/int8_layer.py [fp16]

In int8 by the Triton kernels and by torch's own operations, and in float. Calls are queued as in training, so that at
few tokens the launches count. One line a number of tokens, the best of three rounds.
"""

import sys
from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import nn

from huarizo.kernels import int8_gpu
from huarizo.model.frozen.int8 import quantise

SHAPES = {(2048, 2048): 2, (2048, 256): 2, (2048, 5632): 2, (5632, 2048): 1}
"""(input, output) channels -> how many of them a decoder layer has."""
TOKENS = 1024, 4096, 16384
ROUNDS, CALLS = 3, 20


def milliseconds(step: Callable[[], object]) -> float:
    taken = []
    for _ in range(ROUNDS + 1):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        for _ in range(CALLS):
            step()
        ended.record()
        torch.cuda.synchronize()
        taken.append(began.elapsed_time(ended) / CALLS)
    return min(taken[1:])


def layer_milliseconds(layer: nn.Module, tokens: int, channels: tuple[int, int], dtype: torch.dtype) -> float:
    x = torch.randn(tokens, channels[0], device="cuda", dtype=dtype, requires_grad=True)
    grad = torch.randn(tokens, channels[1], device="cuda", dtype=dtype)
    return milliseconds(lambda: torch.autograd.grad(layer(x), x, grad))


def main(dtype: torch.dtype) -> None:
    on = torch.device("cuda", 0)
    print(f"{torch.cuda.get_device_name(on)}, torch {torch.__version__}, {dtype}")
    print(f"Triton kernels: {int8_gpu.reason_against(on, dtype) or 'used'}")
    for tokens in TOKENS:
        total = {"int8, Triton": 0.0, "int8, torch": 0.0, "float": 0.0}
        for channels, count in SHAPES.items():
            linear = nn.Linear(*channels, bias=False, device=on, dtype=dtype).requires_grad_(False)
            stored = quantise([linear], torch.rand(channels[0], device=on) + 0.5)[0]
            total["int8, Triton"] += count * layer_milliseconds(stored, tokens, channels, dtype)
            with patch.object(int8_gpu, "reason_against", lambda *_: "not in this measurement"):
                total["int8, torch"] += count * layer_milliseconds(stored, tokens, channels, dtype)
            total["float"] += count * layer_milliseconds(linear, tokens, channels, dtype)
        print(f"{tokens:6} tokens", *(f"{name} {taken:.2f} ms" for name, taken in total.items()), sep="   ")


if __name__ == "__main__":
    main(torch.float16 if "fp16" in sys.argv[1:] else torch.bfloat16)
