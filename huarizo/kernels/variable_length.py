"""Packed attention by torch's own kernels for NVIDIA GPUs: FlashAttention, and the memory-efficient one.

FlashAttention wants 16-bit floats and compute capability 8.0. The memory-efficient kernel also runs in fp32, and in
fp16 on older GPUs, but key and value heads are repeated for it. Both read the boundaries of the examples on the GPU, so
nothing waits for it, and both know sliding windows. Neither knows soft caps or sinks.
Seen with torch 2.11 to 2.13; tests/cuda compares both with the reference.
"""

from typing import Any, Literal

import torch

Kernel = Literal["flash", "efficient"]
FLASH_SINCE = 8, 0  # compute capability
LARGEST, STEP = 256, 8  # head size, and what it is a multiple of
CAUSAL_FROM_TOP_LEFT = 1  # custom_mask_type
LSE_ALIGNED = 32  # query positions

# Shapes: H query heads, K key/value heads, each shared by G = H / K query heads; T tokens; D head size; n examples.


def kernel_for(q: torch.Tensor, cap: float, sinks: torch.Tensor | None) -> Kernel | None:
    """The fastest of torch's kernels for these queries, [H, T, D], on their device; None if there is none."""
    size = q.shape[-1]
    if q.device.type != "cuda" or cap or sinks is not None or size % STEP or size > LARGEST:
        return None
    new = torch.cuda.get_device_capability(q.device) >= FLASH_SINCE
    if new and q.dtype in (torch.float16, torch.bfloat16):
        return "flash"
    return "efficient" if q.dtype in (torch.float16, torch.float32) else None


def saved_shape(kernel: Kernel, q: torch.Tensor, cu_seqlens: torch.Tensor, longest: int) -> tuple[int, ...]:
    """The shape of the second result of `forward`, float32."""
    if kernel == "flash":
        return q.shape[0], q.shape[1]
    return cu_seqlens.shape[0] - 1, q.shape[0], (longest + LSE_ALIGNED - 1) // LSE_ALIGNED * LSE_ALIGNED


def forward(
    kernel: Kernel,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
    scale: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q: [H, T, D]; k, v: [K, T, D]; cu_seqlens: int32 [n + 1] on the same GPU; longest: tokens of the longest example.

    Returns out [T, H, D], and the log-sum-exp of the scores, for `backward` only.
    """
    lengths = (cu_seqlens, cu_seqlens, longest, longest)
    if kernel == "flash":
        q, k, v = (_by_token(x) for x in (q, k, v))
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, *lengths, 0.0, True, False, scale=scale, **_sides(window)
        )
        return out, lse
    q, k, v = _repeated(q, k, v)
    out, lse, *_ = torch.ops.aten._efficient_attention_forward(
        q, k, v, None, *lengths, 0.0, CAUSAL_FROM_TOP_LEFT, True, scale=scale, window_size=window or None
    )
    return out[0], lse


def backward(
    kernel: Kernel,
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
    scale: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, in their shapes, each with the memory layout [T, heads, D]. grad, out: [T, H, D]."""
    heads, groups = k.shape[0], q.shape[0] // k.shape[0]
    lengths = (cu_seqlens, cu_seqlens, longest, longest)
    if kernel == "flash":
        q, k, v = (_by_token(x) for x in (q, k, v))
        no_dropout = torch.empty(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
        grads = torch.ops.aten._flash_attention_backward(
            grad.contiguous(), q, k, v, out, lse, *lengths, 0.0, True, *no_dropout, scale=scale, **_sides(window)
        )
        return tuple(x.contiguous().transpose(0, 1) for x in grads)  # pyright: ignore[reportReturnType]
    q, k, v = _repeated(q, k, v)
    no_dropout = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    grad_q, *grads, _ = torch.ops.aten._efficient_attention_backward(
        grad.contiguous()[None], q, k, v, None, out[None], *lengths, lse, 0.0, *no_dropout, CAUSAL_FROM_TOP_LEFT,
        False, scale=scale, window_size=window or None,
    )  # fmt: skip
    grad_k, grad_v = (x[0].unflatten(1, (heads, groups)).sum(2) for x in grads)
    return grad_q[0].contiguous().transpose(0, 1), grad_k.transpose(0, 1), grad_v.transpose(0, 1)


def _by_token(x: torch.Tensor) -> torch.Tensor:
    """[heads, T, D] -> [T, heads, D], with the channels of a head side by side."""
    x = x.transpose(0, 1)
    return x if x.stride(-1) == 1 else x.contiguous()


def _repeated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[1, T, H, D] each: key and value heads are repeated for the queries that share them."""
    groups = q.shape[0] // k.shape[0]
    k, v = (_by_token(x).unsqueeze(2).expand(-1, -1, groups, -1).flatten(1, 2) for x in (k, v))
    return _by_token(q)[None], k[None], v[None]


def _sides(window: int) -> dict[str, Any]:
    """How many keys to the left and to the right of its own a query sees; no window is no keyword."""
    return {"window_size_left": window - 1, "window_size_right": 0} if window else {}
