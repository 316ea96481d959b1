"""Dropout with a hashed mask, alone and in front of a thin linear layer, in C (dropout.c), for bf16 and fp32."""

import functools
import struct

import torch

from huarizo.kernels import build

# `Call` in dropout.c: rows, inputs, rank, stride; x, places, weight, h, out and grad; seed, threshold; scale; bf16,
# threads
CALL = struct.Struct("@4q6q2If2i")


@functools.cache
def reason_against(dtype: torch.dtype) -> str | None:
    """Why values of this dtype can't be dropped in C; None where they can."""
    if dtype not in (torch.bfloat16, torch.float32):
        return f"there is no kernel for {dtype}"
    library = build.load("dropout")
    return library if isinstance(library, str) else None


def dropped(x: torch.Tensor, places: torch.Tensor, seed: int, threshold: int, scale: float) -> torch.Tensor:
    """x [T, K] * scale where the hash of place, channel and seed is at least `threshold`, 0 elsewhere; contiguous."""
    out = x.new_empty(x.shape)
    _call("dropout", x, places, None, (None, out, None), (seed, threshold, scale))
    return out


def down(
    x: torch.Tensor, weight: torch.Tensor, places: torch.Tensor, seed: int, threshold: int, scale: float
) -> torch.Tensor:
    """The dropped x times weight'. x: [T, K]; weight: float32 [r, K], rounded to x's dtype; returns [T, r] in that."""
    h = x.new_empty(x.shape[0], weight.shape[0])
    _call("dropout_down", x, places, weight, (h, None, None), (seed, threshold, scale))
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
    """Gradients of x, in its dtype, and of weight, float32, from that of the result of `down`."""
    grad_x, grad_weight = x.new_empty(x.shape), torch.empty_like(weight)
    tensors = grad.contiguous(), grad_x, grad_weight
    _call("dropout_down_backward", x, places, weight, tensors, (seed, threshold, scale))
    return grad_x, grad_weight


def _call(
    name: str,
    x: torch.Tensor,
    places: torch.Tensor,
    weight: torch.Tensor | None,
    tensors: tuple[torch.Tensor | None, ...],
    mask: tuple[int, int, float],
) -> None:
    """tensors: h, out and grad; mask: seed, threshold and scale."""
    if weight is not None and (weight.dtype != torch.float32 or weight.shape[1] != x.shape[1]):
        raise ValueError(f"{weight.dtype} {tuple(weight.shape)} doesn't fit {x.dtype} {tuple(x.shape)}")
    if places.dtype != torch.int32 or places.shape != x.shape[:1]:
        raise ValueError(f"{places.dtype} {tuple(places.shape)} are no places of {x.shape[0]} tokens")
    x, weight = x if x.stride(1) == 1 else x.contiguous(), weight if weight is None else weight.contiguous()
    places = places.contiguous()
    call = CALL.pack(
        *x.shape, 0 if weight is None else weight.shape[0], x.stride(0) * x.element_size(), x.data_ptr(),
        *(0 if tensor is None else tensor.data_ptr() for tensor in (places, weight, *tensors)),
        *mask, x.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    if getattr(build.load("dropout"), f"huarizo_{name}")(call):
        raise MemoryError("no memory for a product behind dropout")
