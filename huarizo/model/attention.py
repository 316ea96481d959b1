"""Causal attention over packed examples, each fully isolated, registered with Transformers as `huarizo_packed`.

`cu_seqlens` marks the examples of a packed row; it is passed through the model's keyword arguments. Each example is
computed on its own slice, so there is no mask of the whole row, and no example's values depend on another's. It needs
no FlashAttention and runs on every device. On a CPU it uses the C kernel where kernels/attention.py has one, and
otherwise batched products on blocks that fit the cache, which at the lengths of instruction data are several times as
fast as torch's own CPU kernel. On other devices it uses torch's scaled_dot_product_attention.
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
from huarizo.kernels.operations import operation

NAME = "huarizo_packed"
BLOCK = 64  # queries at a time: the scores of a block fit the cache, and keys above the diagonal are skipped

# Shapes: H query heads, K key/value heads, each shared by G = H / K query heads; T tokens of the packed row; D the head
# size. An example spans tokens s to e. A block has B of its queries, which see the N keys up to its end; x = G * B.


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> torch.Tensor:
    """Reference implementation: softmax over one [T, T] score matrix with a block-diagonal causal mask.

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
    """(s, a, b) for each block of queries: the start of its example, its own start, and its end."""
    for s, e in itertools.pairwise(cu_seqlens.tolist()):
        for a in range(s, e, BLOCK):
            yield s, a, min(a + BLOCK, e)


def _folded(states: torch.Tensor, heads: int) -> torch.Tensor:
    """[H, B, D] -> [K, x, D]: the queries that share a key/value head, stacked."""
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
    q, k, v = (x.contiguous() for x in (q, k, v))  # with other strides torch rounds some products differently
    out = q.new_empty(q.shape[1], q.shape[0], q.shape[2])
    for s, a, b in _blocks(cu_seqlens):
        p_KxN = _probabilities(_folded(q[:, a:b] * scale, heads), k[:, s:b], b - a, mask)
        out[a:b] = torch.bmm(p_KxN, v[:, s:b]).view(q.shape[0], b - a, -1).transpose(0, 1)
    return out


def _gradients_in_torch(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v. The probabilities are recomputed block by block.

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


@operation("packed_attention")
def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q: [H, T, D]; k, v: [K, T, D]. Returns out [T, H, D] and, for the backward pass in C, fp32 [H, T].

    The latter is zeros when computed in torch, whose backward pass doesn't read it.
    """
    if _in_c(q, k, v):
        return kernel.forward(q, k, v, cu_seqlens, scale)
    return _attend_in_torch(q, k, v, cu_seqlens, scale), q.new_zeros(q.shape[:2], dtype=torch.float32)


@torch.library.register_fake("huarizo::packed_attention")
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape[1], q.shape[0], q.shape[2]), q.new_empty(q.shape[:2], dtype=torch.float32)


@operation("packed_attention_backward")
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


@torch.library.register_fake("huarizo::packed_attention_backward")
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


torch.library.register_autograd("huarizo::packed_attention", _backward, setup_context=_save)


WITHOUT_EFFECT = frozenset({
    "position_ids", "cache_position", "use_cache", "logits_to_keep", "num_items_in_batch", "output_hidden_states",
    "return_dict",
})  # fmt: skip
"""Keyword arguments that reach an attention function without changing what it computes."""


def _refuse_others(module: torch.nn.Module, mask: torch.Tensor | None, kwargs: dict[str, object]) -> None:
    """Raise a ModelError for arguments that ask for more than causal attention within each example: a sliding window,
    soft caps, sinks, dropout, a bias, a mask, or anything unknown. None, False and 0 ask for nothing."""
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
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """The attention function that Transformers calls.

    query: [1, H, T, D]; key, value: [1, K, T, D]; cu_seqlens: [n + 1] int32. Returns ([1, T, H, D], None).

    Raises:
        ValueError: `cu_seqlens` is missing. Generation uses Transformers' own attention instead.
        ModelError: the arguments ask for another attention than this one.
    """
    _refuse_others(module, attention_mask, kwargs)
    if cu_seqlens is None:
        raise ValueError(f"{NAME} needs cu_seqlens; call model.set_attn_implementation('sdpa') to generate")
    if query.device.type == "cpu":
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return _attend(query[0], key[0], value[0], cu_seqlens, scale)[0][None], None
    return _attend_by_example(query, key, value, cu_seqlens, scaling), None  # pyright: ignore[reportCallIssue]


@torch.compiler.disable  # the number and lengths of the examples differ from batch to batch
def _attend_by_example(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Returns [1, T, H, D]. The CPU reads the boundaries; if they are on a GPU, this synchronizes with it."""
    lengths = cu_seqlens.diff().tolist()
    outputs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
        for q, k, v in zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def no_mask(*args: object, **kwargs: object) -> None:
    """The mask function of `huarizo_packed`, which needs no mask."""


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, no_mask)
