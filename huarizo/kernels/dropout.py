"""Dropout with a hashed mask, alone and fused with a thin linear layer, in C (dropout.c), for bf16 and fp32.

Only pointers and strides are passed to C. The results are bit-identical for any number of threads, which is torch's.
Shapes: T tokens, K channels, r the rank.
"""

import ctypes
import functools

import torch

from huarizo.kernels import build
from huarizo.kernels.call import address, run


class Call(ctypes.Structure):
    """`Call` in dropout.c; the stride is in bytes."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("places", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("h", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("seed", ctypes.c_uint32),
        ("threshold", ctypes.c_uint32),
        ("scale", ctypes.c_float),
        ("bf16", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


def library() -> build.Library | str:
    """The library compiled from dropout.c, or the reason why there is none."""
    return build.load("dropout", Call)


@functools.cache
def reason_against(dtype: torch.dtype) -> str | None:
    """Why dropout of this dtype can't be computed in C; None if it can."""
    if dtype not in (torch.bfloat16, torch.float32):
        return f"there is no kernel for {dtype}"
    found = library()
    return found if isinstance(found, str) else None


def dropped(x: torch.Tensor, places: torch.Tensor, seed: int, threshold: int, scale: float) -> torch.Tensor:
    """x [T, K] * scale where the hash of place, channel and seed is at least `threshold`, else 0; contiguous."""
    out = x.new_empty(x.shape)
    _run("dropout", x, places, (seed, threshold, scale), out=out)
    return out


def down(
    x: torch.Tensor, weight: torch.Tensor, places: torch.Tensor, seed: int, threshold: int, scale: float
) -> torch.Tensor:
    """dropout(x) weight' in the dtype of x. x: [T, K]; weight: float32 [r, K], rounded to x's dtype; returns [T, r]."""
    h = x.new_empty(x.shape[0], weight.shape[0])
    _run("dropout_down", x, places, (seed, threshold, scale), weight=weight.contiguous(), h=h)
    return h


def down_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    places: torch.Tensor,
    seed: int,
    threshold: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x, in its dtype, and of weight, float32, from the gradient of `down`'s result."""
    weight = weight.contiguous()
    grad_x, grad_weight = x.new_empty(x.shape), torch.empty_like(weight)
    mask = seed, threshold, scale
    _run("dropout_down_backward", x, places, mask, weight=weight, h=grad.contiguous(), out=grad_x, grad=grad_weight)
    return grad_x, grad_weight


def up_backward(grad: torch.Tensor, h: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of h [T, r], in its dtype, and of weight, float32 [N, r], from that of y = h weight', [T, N].

    They are products of the kind of `down`, without a dropout, with the gradient in place of x.
    """
    places = torch.empty(len(grad), dtype=torch.int32)  # nothing is dropped, so they don't matter
    across = weight.t().contiguous()
    grad_h, grad_across = h.new_empty(h.shape), torch.empty_like(across)
    _run("dropout_down", grad, places, (0, 0, 1.0), weight=across, h=grad_h)
    _run("dropout_down_backward", grad, places, (0, 0, 1.0), weight=across, h=h.contiguous(), grad=grad_across)
    return grad_h, grad_across.t()


def _run(
    function: str,
    x: torch.Tensor,
    places: torch.Tensor,
    mask: tuple[int, int, float],
    weight: torch.Tensor | None = None,
    h: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    grad: torch.Tensor | None = None,
) -> None:
    """mask: seed, threshold and scale; the tensors: the fields of `Call` that the function reads or writes."""
    x, places = x if x.stride(1) == 1 else x.contiguous(), places.contiguous()  # keeps them alive until C returns
    (rows, inputs), rank = x.shape, 0 if weight is None else weight.shape[0]
    seed, threshold, scale = mask
    call = Call(
        rows=rows, inputs=inputs, rank=rank, x_stride=x.stride(0) * x.element_size(), x=x.data_ptr(),
        places=address(function, places, torch.int32, rows),
        weight=address(function, weight, torch.float32, rank, inputs),
        h=address(function, h, x.dtype, rows, rank), out=address(function, out, x.dtype, rows, inputs),
        grad=address(function, grad, torch.float32, rank, inputs), seed=seed, threshold=threshold, scale=scale,
        bf16=x.dtype == torch.bfloat16, threads=torch.get_num_threads(),
    )  # fmt: skip
    run(library(), function, call)
