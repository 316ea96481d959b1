"""Packed attention and its gradient in C (attention.c), for bf16 and fp32 on CPUs with AVX512.

Only pointers and strides go to C; its results are the same bytes for any number of threads, which is torch's.
Shapes: H query heads on K key/value heads, T tokens of the packed row, D a head's size.
"""

import functools
import struct
from collections.abc import Sequence

import torch

from huarizo.host import cpu_flags
from huarizo.kernels import build

# `Call` in attention.c: cu_seqlens and sizes; scale, bf16, threads; q, k, v, out, grad and its three results; lse
CALL = struct.Struct("@6qf2i24qq")
NOWHERE = (0, 0, 0)
LARGEST = 256
FAILURES = {1: "cu_seqlens must rise from 0 to the row's length", 2: "no memory for packed attention"}


@functools.cache
def reason_against(dtype: torch.dtype, size: int) -> str | None:
    """Why heads of this dtype and size can't be attended to in C; None where they can."""
    if dtype not in (torch.bfloat16, torch.float32):
        return f"there is no kernel for {dtype}"
    if size % 16 or not 0 < size <= LARGEST:
        return f"a head's size must be a multiple of 16 up to {LARGEST}, not {size}"
    if dtype == torch.bfloat16 and "avx512_bf16" not in cpu_flags():
        return "this CPU has no avx512_bf16"
    library = build.load("attention")
    return library if isinstance(library, str) else None


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q: [H, T, D]; k, v: [K, T, D], of one dtype. Returns out [T, H, D] and the scores' log-sum-exp, fp32 [H, T].

    The latter is in base 2 and meant for `backward` alone.

    Raises:
        ValueError: `cu_seqlens` that don't rise from 0 to T, or shapes that don't fit each other.
    """
    out = q.new_empty(q.shape[1], q.shape[0], q.shape[2])
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    _call("attention_forward", (q, k, v, out.transpose(0, 1)), lse, cu_seqlens, scale)
    return out, lse


def backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, contiguous. grad: [T, H, D], the gradient of `out`; out, lse: from `forward`."""
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    tensors = (q, k, v, out.transpose(0, 1), grad.transpose(0, 1), grad_q, grad_k, grad_v)
    _call("attention_backward", tensors, lse, cu_seqlens, scale)
    return grad_q, grad_k, grad_v


def _call(
    name: str, tensors: Sequence[torch.Tensor], lse: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> None:
    """tensors: [heads, T, D] each, in the order of `Call`; those at the end may be left out."""
    q, k, v = tensors[:3]
    if q.shape[0] % k.shape[0] or k.shape != v.shape or q.shape[1:] != k.shape[1:]:
        raise ValueError(f"q, k and v don't fit each other: {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    tensors = [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]  # held until C is done
    cu_seqlens = cu_seqlens.to(torch.int32).contiguous()
    bytes_each = q.element_size()
    places = [(x.data_ptr(), x.stride(0) * bytes_each, x.stride(1) * bytes_each) for x in tensors]
    places += [NOWHERE] * (8 - len(places))
    call = CALL.pack(
        cu_seqlens.data_ptr(), cu_seqlens.shape[0] - 1, q.shape[1], q.shape[0], k.shape[0], q.shape[2],
        scale, q.dtype == torch.bfloat16, torch.get_num_threads(),
        *(number for place in places for number in place), lse.data_ptr(),
    )  # fmt: skip
    failure = getattr(build.load("attention"), name)(call)
    if failure:
        raise (ValueError if failure == 1 else MemoryError)(FAILURES[failure])
