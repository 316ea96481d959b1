"""Causal attention over packed examples, each one isolated exactly, registered with Transformers as `huarizo_packed`.

The examples of a packed row are told apart by `cu_seqlens`, which travels through the model's keyword arguments. Every
example is attended to on its own slice, so no mask is made, no token of another example is ever read, and the values
of one example can't depend on another's. It needs no FlashAttention and runs on every device.
Seen with transformers 5.17 to 5.23; tests/model/test_attention.py fails when the hooks move.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "huarizo_packed"


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> torch.Tensor:
    """The definition of correct: softmax over one [T, T] score matrix with a block-diagonal causal mask.

    q: [H, T, D]; k, v: [K, T, D] with H a multiple of K; cu_seqlens: [n + 1]. Returns [H, T, D].
    """
    groups, length = q.shape[0] // k.shape[0], q.shape[1]
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    at = torch.arange(length, device=q.device)
    example = torch.searchsorted(cu_seqlens[1:].to(at.dtype), at, right=True)
    allowed = (example[:, None] == example[None]) & (at[:, None] >= at[None])
    scores = (q.float() @ k.float().transpose(1, 2) * scale).masked_fill(~allowed, float("-inf"))
    return (scores.softmax(-1) @ v.float()).to(q.dtype)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as Transformers calls it.

    query: [1, H, T, D]; key, value: [1, K, T, D]; cu_seqlens: [n + 1] int32. Returns ([1, T, H, D], None).

    Raises:
        ValueError: without `cu_seqlens`. Generation uses Transformers' own attention instead.
    """
    if cu_seqlens is None:
        raise ValueError(f"{NAME} needs cu_seqlens; call model.set_attn_implementation('sdpa') to generate")
    lengths = cu_seqlens.diff().tolist()
    outputs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
        for q, k, v in zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def no_mask(*args: Any, **kwargs: Any) -> None:
    """The mask function of `huarizo_packed`: there is none."""


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, no_mask)
