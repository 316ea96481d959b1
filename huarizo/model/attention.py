"""Causal attention over packed examples, each one isolated exactly, registered with Transformers as `huarizo_packed`.

The examples of a packed row are told apart by `cu_seqlens`, which travels through the model's keyword arguments. Every
example is attended to on its own slice, so no mask of the whole row is made, no token of another example is ever read,
and the values of one example can't depend on another's. It needs no FlashAttention and runs on every device: on a CPU
by a kernel in C where kernels/attention.py can have one, and otherwise by plain batched products on blocks that stay in
the cache, which beat torch's own CPU kernel several times at the lengths of instruction data; elsewhere by torch's
scaled_dot_product_attention.
Seen with transformers 5.17 to 5.23; tests/model/test_attention.py fails when the hooks move.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from huarizo.errors import ModelError
from huarizo.kernels import attention as kernel

NAME = "huarizo_packed"
BLOCK = 64  # queries at a time: scores of one block fit the cache, and what lies above the diagonal is skipped

# Shapes: H heads on K key/value heads, G = H / K of them sharing one; T tokens of the packed row, D a head's size;
# an example has tokens s to e, a block of its queries B of them, which see the N keys up to the block's end; x = G * B.


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> torch.Tensor:
    """The definition of correct: softmax over one [T, T] score matrix with a block-diagonal causal mask.

    q: [H, T, D]; k, v: [K, T, D] with H a multiple of K; cu_seqlens: [n + 1]. Returns [T, H, D].
    """
    groups, length = q.shape[0] // k.shape[0], q.shape[1]
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    at_T = torch.arange(length, device=q.device)
    example_T = torch.searchsorted(cu_seqlens[1:].to(at_T.dtype), at_T, right=True)
    allowed_TT = (example_T[:, None] == example_T[None]) & (at_T[:, None] >= at_T[None])
    scores_HTT = (q.float() @ k.float().transpose(1, 2) * scale).masked_fill(~allowed_TT, float("-inf"))
    return (scores_HTT.softmax(-1) @ v.float()).to(q.dtype).transpose(0, 1)


def _blocks(cu_seqlens: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """(s, a, b) for each block of queries: where its example begins, where it begins, and where it ends."""
    for s, e in itertools.pairwise(cu_seqlens.tolist()):
        for a in range(s, e, BLOCK):
            yield s, a, min(a + BLOCK, e)


def _folded(states: torch.Tensor, heads: int) -> torch.Tensor:
    """[H, B, D] -> [K, x, D]: the queries that share a key/value head, one below the other."""
    return states.reshape(heads, -1, states.shape[-1])


def _probabilities(q_KxD: torch.Tensor, k_KND: torch.Tensor, queries: int, mask: torch.Tensor) -> torch.Tensor:
    """Softmax of the causal scores of one block: [K, x, N]."""
    scores_KxN = torch.bmm(q_KxD, k_KND.transpose(1, 2))
    diagonal_KGBB = scores_KxN.view(k_KND.shape[0], -1, queries, k_KND.shape[1])[..., -queries:]
    diagonal_KGBB += mask[:queries, :queries]
    return torch.softmax(scores_KxN, -1)


def _causal(like: torch.Tensor) -> torch.Tensor:
    return torch.full((BLOCK, BLOCK), float("-inf"), dtype=like.dtype).triu(1)


def _attend_in_torch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> torch.Tensor:
    heads, mask = k.shape[0], _causal(q)
    q, k, v = (x.contiguous() for x in (q, k, v))  # torch rounds some products otherwise where strides are others
    out = q.new_empty(q.shape[1], q.shape[0], q.shape[2])
    for s, a, b in _blocks(cu_seqlens):
        p_KxN = _probabilities(_folded(q[:, a:b] * scale, heads), k[:, s:b], b - a, mask)
        out[a:b] = torch.bmm(p_KxN, v[:, s:b]).view(q.shape[0], b - a, -1).transpose(0, 1)
    return out


def _gradients_in_torch(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The probabilities are made again block by block.

    With P the probabilities and dP = dO V': dV = P' dO, dS = P * (dP - rowsum(P * dP)), dQ = dS K, dK = dS' Q.
    """
    heads, mask = k.shape[0], _causal(q)
    grad, q, k, v = grad.transpose(0, 1).contiguous(), q.contiguous(), k.contiguous(), v.contiguous()
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    grad_k, grad_v = (torch.zeros(x.shape, dtype=torch.float32) for x in (k, v))
    for s, a, b in _blocks(cu_seqlens):
        q_KxD, grad_KxD = _folded(q[:, a:b] * scale, heads), _folded(grad[:, a:b], heads)
        p_KxN = _probabilities(q_KxD, k[:, s:b], b - a, mask)
        grad_v[:, s:b] += torch.bmm(p_KxN.transpose(1, 2), grad_KxD)
        grad_p_KxN = torch.bmm(grad_KxD, v[:, s:b].transpose(1, 2))
        grad_s_KxN = torch.ops.aten._softmax_backward_data(grad_p_KxN, p_KxN, -1, q.dtype)
        grad_q[:, a:b] = torch.bmm(grad_s_KxN, k[:, s:b]).mul_(scale).view(q.shape[0], b - a, -1)
        grad_k[:, s:b] += torch.bmm(grad_s_KxN.transpose(1, 2), q_KxD)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _in_c(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    same = q.dtype == k.dtype == v.dtype
    return same and kernel.reason_against(q.dtype, q.shape[-1]) is None


@torch.library.custom_op("huarizo::packed_attention", mutates_args=())
def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q: [H, T, D]; k, v: [K, T, D]. Returns out [T, H, D] and what the backward pass in C wants, fp32 [H, T].

    In torch the latter is zeros: its backward pass doesn't read them.
    """
    if _in_c(q, k, v):
        return kernel.forward(q, k, v, cu_seqlens, scale)
    return _attend_in_torch(q, k, v, cu_seqlens, scale), q.new_zeros(q.shape[:2], dtype=torch.float32)


@_attend.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape[1], q.shape[0], q.shape[2]), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("huarizo::packed_attention_backward", mutates_args=())
def _attend_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v. grad, out: [T, H, D]; lse: the second result of the forward pass."""
    if _in_c(q, k, v):
        return kernel.backward(grad, q, k, v, out, lse, cu_seqlens, scale)
    return _gradients_in_torch(grad, q, k, v, cu_seqlens, scale)


@_attend_backward.register_fake
def _(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))  # pyright: ignore


def _save(ctx: Any, inputs: tuple[torch.Tensor | float, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, cu_seqlens, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output, cu_seqlens)


def _backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    return (*_attend_backward(grad, *ctx.saved_tensors, ctx.scale), None, None)


_attend.register_autograd(_backward, setup_context=_save)


WITHOUT_EFFECT = frozenset({
    "position_ids", "cache_position", "use_cache", "logits_to_keep", "num_items_in_batch", "output_hidden_states",
    "return_dict",
})  # fmt: skip
"""What reaches an attention function that has no say in what attention computes."""


def _refuse_others(module: torch.nn.Module, mask: torch.Tensor | None, kwargs: dict[str, Any]) -> None:
    """What asks for another attention than the causal one of each example: a sliding window, soft caps, sinks, dropout,
    a bias, a mask, or anything that is not known. None, False and no dropout ask for nothing."""
    asked = {"attention_mask": mask, **kwargs}
    causal = asked.pop("is_causal", None)
    odd = [
        name if isinstance(value, torch.Tensor) else f"{name}={value}"
        for name, value in asked.items()
        if name not in WITHOUT_EFFECT and (isinstance(value, torch.Tensor) or value)
    ]
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        odd.append("is_causal=False")
    if odd:
        raise ModelError(f"this model can't be trained here: packed attention has no {', '.join(odd)}")


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
        ModelError: the model's attention is another than this, by what is passed.
    """
    _refuse_others(module, attention_mask, kwargs)
    if cu_seqlens is None:
        raise ValueError(f"{NAME} needs cu_seqlens; call model.set_attn_implementation('sdpa') to generate")
    if query.device.type == "cpu":
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return _attend(query[0], key[0], value[0], cu_seqlens, scale)[0][None], None
    return _attend_by_example(query, key, value, cu_seqlens, scaling), None  # pyright: ignore[reportCallIssue]


@torch.compiler.disable  # how many examples there are, and how long, differs from batch to batch
def _attend_by_example(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """[1, T, H, D]. The boundaries are read by the CPU: where they are on a card, it is waited for."""
    lengths = cu_seqlens.diff().tolist()
    outputs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
        for q, k, v in zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def no_mask(*args: object, **kwargs: object) -> None:
    """The mask function of `huarizo_packed`: there is none."""


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, no_mask)
