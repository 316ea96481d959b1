"""Dropout with a hashed mask in C (dropout.c), for bf16 and fp32."""

import ctypes
import functools

import torch

from huarizo.kernels import build

SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
ARGUMENTS = (
    ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_float, ctypes.c_int,
)  # fmt: skip


@functools.cache
def reason_against() -> str | None:
    """Why there is no kernel here; None where there is."""
    library = build.load("dropout")
    return library if isinstance(library, str) else None


@functools.cache
def _function(dtype: torch.dtype) -> "ctypes._NamedFuncPointer":
    function = getattr(build.load("dropout"), f"huarizo_dropout_{SUFFIXES[dtype]}")
    function.argtypes, function.restype = ARGUMENTS, None
    return function


def dropped(x: torch.Tensor, seed: int, threshold: int, scale: float) -> torch.Tensor:
    """x * scale where the hash of place and seed is at least `threshold`, 0 elsewhere; contiguous, like x."""
    x = x.contiguous()
    y = torch.empty_like(x)
    _function(x.dtype)(x.data_ptr(), y.data_ptr(), x.numel(), seed, threshold, scale, torch.get_num_threads())
    return y
