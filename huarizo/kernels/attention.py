"""Packed attention and its gradient in C (attention.c), for bf16 and fp32, with windows, caps and sinks.

Only pointers and strides are passed to C. The results are bit-identical for any number of threads, which is torch's.
Shapes: H query heads, K key/value heads, T tokens of the packed row, D head size.
"""

import ctypes
import functools

import torch

from huarizo.kernels import build
from huarizo.kernels.call import address, run

LARGEST = 256  # head size
OF_KEYS = {"k", "v", "grad_k", "grad_v"}  # tensors with K heads; the others have H


class Tensor(ctypes.Structure):
    """`Tensor` in attention.c: [heads, T, D], strides in bytes."""

    _fields_ = (("data", ctypes.c_void_p), ("head", ctypes.c_int64), ("token", ctypes.c_int64))


class Call(ctypes.Structure):
    """`Call` in attention.c."""

    _fields_ = (
        ("cu_seqlens", ctypes.c_void_p),
        ("examples", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("cap", ctypes.c_float),
        ("bf16", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("q", Tensor),
        ("k", Tensor),
        ("v", Tensor),
        ("out", Tensor),
        ("grad", Tensor),
        ("grad_q", Tensor),
        ("grad_k", Tensor),
        ("grad_v", Tensor),
        ("lse", ctypes.c_void_p),
        ("sinks", ctypes.c_void_p),
    )


def library() -> build.Library | str:
    """The library compiled from attention.c, or the reason why there is none."""
    return build.load("attention", Call)


@functools.cache
def reason_against(dtype: torch.dtype, size: int) -> str | None:
    """Why attention with heads of this dtype and size can't be computed in C; None if it can."""
    if dtype not in (torch.bfloat16, torch.float32):
        return f"there is no kernel for {dtype}"
    if size % 16 or not 0 < size <= LARGEST:
        return f"a head's size must be a multiple of 16 up to {LARGEST}, not {size}"
    found = library()
    return found if isinstance(found, str) else None


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    window: int = 0,
    cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q: [H, T, D]; k, v: [K, T, D], of one dtype; window, cap: 0 for none; sinks: [H].

    Returns out [T, H, D] and the log-sum-exp of the scores and the sink, fp32 [H, T], in base 2, for `backward` only.

    Raises:
        ValueError: `cu_seqlens` doesn't rise from 0 to T, or the shapes don't fit each other.
    """
    out = q.new_empty(q.shape[1], q.shape[0], q.shape[2])
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    sinks = None if sinks is None else sinks.float().contiguous()
    call = Call(
        scale=scale, window=window, cap=cap, sinks=address("attention_forward", sinks, torch.float32, q.shape[0])
    )
    _run("attention_forward", call, cu_seqlens, lse, q=q, k=k, v=v, out=out.transpose(0, 1))
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
    window: int = 0,
    cap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, contiguous. grad: [T, H, D], the gradient of `out`; out, lse: from `forward`.

    It needs no sinks, because `lse` has them in it.
    """
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    _run(
        "attention_backward", Call(scale=scale, window=window, cap=cap), cu_seqlens, lse, q=q, k=k, v=v,
        out=out.transpose(0, 1), grad=grad.transpose(0, 1), grad_q=grad_q, grad_k=grad_k, grad_v=grad_v,
    )  # fmt: skip
    return grad_q, grad_k, grad_v


def _run(function: str, call: Call, cu_seqlens: torch.Tensor, lse: torch.Tensor, **tensors: torch.Tensor) -> None:
    """call: has all that isn't given here; tensors: the fields of `Call` that the function reads or writes, each
    [H, T, D] or [K, T, D]."""
    of_queries, of_keys, dtype = tensors["q"].shape, tensors["k"].shape, tensors["q"].dtype
    heads, tokens, size = of_queries
    if heads % of_keys[0] or of_keys[1:] != of_queries[1:]:
        raise ValueError(f"q and k don't fit each other: {tuple(of_queries)}, {tuple(of_keys)}")
    cu_seqlens = cu_seqlens.to(torch.int32).contiguous()
    call.cu_seqlens = address(function, cu_seqlens, torch.int32, len(cu_seqlens))
    call.lse = address(function, lse, torch.float32, heads, tokens)
    call.examples, call.tokens, call.heads, call.kv_heads = len(cu_seqlens) - 1, tokens, heads, of_keys[0]
    call.size, call.bf16, call.threads = size, dtype == torch.bfloat16, torch.get_num_threads()
    held = [cu_seqlens]  # keeps them alive until C returns
    for name, x in tensors.items():
        shape = of_keys if name in OF_KEYS else of_queries
        if x.dtype != dtype or x.shape != shape:
            raise ValueError(f"{function} wants {name} of {dtype} {tuple(shape)}, not {x.dtype} {tuple(x.shape)}")
        head, token, channel = x.stride()
        if channel != 1:
            x = x.contiguous()
            head, token, _ = x.stride()
            held.append(x)
        setattr(call, name, (x.data_ptr(), head * dtype.itemsize, token * dtype.itemsize))
    run(library(), function, call)
