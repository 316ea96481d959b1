"""Causal attention over packed examples, each fully isolated, registered with Transformers as `huarizo_packed`.

`cu_seqlens` marks the examples of a packed row; it is passed through the model's keyword arguments. Each example is
computed on its own slice, so there is no mask of the whole row, and no example's values depend on another's. Sliding
windows, soft caps of the scores and attention sinks are computed too; anything else that a model asks for is refused.
It needs no FlashAttention and runs on every device. On a CPU it uses the C kernel where kernels/attention.py has one,
and otherwise batched products on blocks that fit the cache, which at the lengths of instruction data are several times
as fast as torch's own CPU kernel. On other devices it uses torch's scaled_dot_product_attention where that has all that
is asked for.
Seen with transformers 5.17 to 5.23; tests/model/test_attention.py fails when the hooks move.
"""

import itertools
import math
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
# With a window, query i sees the keys i - window + 1 to i; 0 is none. With a cap the scaled scores become
# cap * tanh(scores / cap); 0 is none. A head's sink is one more score of each of its queries, without a value.


def _seen(rows: torch.Tensor, columns: torch.Tensor, window: int) -> torch.Tensor:
    """Which keys, at `columns`, queries at `rows` see."""
    causal = rows[:, None] >= columns[None]
    return causal & (rows[:, None] - columns[None] < window) if window else causal


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    window: int = 0,
    cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Reference implementation: softmax over one [T, T] score matrix with a block-diagonal causal mask.

    q: [H, T, D]; k, v: [K, T, D] with H a multiple of K; cu_seqlens: [n + 1]; sinks: [H]. Returns [T, H, D].
    """
    groups, length, wide = q.shape[0] // k.shape[0], q.shape[1], torch.promote_types(q.dtype, torch.float32)
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    at_T = torch.arange(length, device=q.device)
    example_T = torch.searchsorted(cu_seqlens[1:].to(at_T.dtype), at_T, right=True)
    allowed_TT = (example_T[:, None] == example_T[None]) & _seen(at_T, at_T, window)
    scores_HTT = q.to(wide) @ k.to(wide).transpose(1, 2) * scale
    if cap:
        scores_HTT = cap * torch.tanh(scores_HTT / cap)
    scores_HTT = scores_HTT.masked_fill(~allowed_TT, float("-inf"))
    if sinks is not None:
        sinks_HT1 = sinks.to(wide)[:, None, None].expand(-1, length, 1)
        scores_HTT = torch.cat([scores_HTT, sinks_HT1], -1)
    return (scores_HTT.softmax(-1)[..., :length] @ v.to(wide)).to(q.dtype).transpose(0, 1)


def _blocks(cu_seqlens: torch.Tensor, window: int) -> Iterator[tuple[int, int, int]]:
    """(s, a, b) for each block of queries: the first key that one of them sees, its own start, and its end."""
    for s, e in itertools.pairwise(cu_seqlens.tolist()):
        for a in range(s, e, BLOCK):
            yield max(s, a - window + 1) if window else s, a, min(a + BLOCK, e)


def _folded(states: torch.Tensor, heads: int) -> torch.Tensor:
    """[H, B, D] -> [K, x, D]: the queries that share a key/value head, stacked."""
    return states.reshape(heads, -1, states.shape[-1])


def _causal(like: torch.Tensor) -> torch.Tensor:
    return torch.full((BLOCK, BLOCK), float("-inf"), dtype=like.dtype).triu(1)


def _mask(causal: torch.Tensor, window: int, s: int, a: int, b: int) -> torch.Tensor:
    """[B, N] for a block of `_blocks`, or its last columns, before which all keys are seen; -inf where one is not."""
    if not window or b - s <= window:
        return causal[: b - a, : b - a]
    seen_BN = _seen(torch.arange(a, b), torch.arange(s, b), window)
    return torch.zeros(seen_BN.shape, dtype=causal.dtype).masked_fill_(~seen_BN, float("-inf"))


def _probabilities(
    q_KxD: torch.Tensor, k_KND: torch.Tensor, mask: torch.Tensor, cap: float, sinks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Softmax of the scores of one block: [K, x, N]; with a cap also its slope at each of the scores."""
    scores_KxN, slope_KxN = torch.bmm(q_KxD, k_KND.transpose(1, 2)), None
    if cap:
        bent_KxN = torch.tanh(scores_KxN.to(torch.promote_types(q_KxD.dtype, torch.float32)) / cap)
        scores_KxN, slope_KxN = (bent_KxN * cap).to(q_KxD.dtype), 1 - bent_KxN * bent_KxN
    heads, keys = k_KND.shape[:2]
    scores_KxN.view(heads, -1, len(mask), keys)[..., -mask.shape[1] :] += mask
    if sinks is None:
        return torch.softmax(scores_KxN, -1), slope_KxN
    sinks_Kx1 = sinks.to(q_KxD.dtype).repeat_interleave(len(mask)).view(heads, -1, 1)
    return torch.softmax(torch.cat([scores_KxN, sinks_Kx1], -1), -1)[..., :-1], slope_KxN


def _attend_in_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    window: int,
    cap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    heads, causal = k.shape[0], _causal(q)
    q, k, v = (x.contiguous() for x in (q, k, v))  # with other strides torch rounds some products differently
    out = q.new_empty(q.shape[1], q.shape[0], q.shape[2])
    for s, a, b in _blocks(cu_seqlens, window):
        mask = _mask(causal, window, s, a, b)
        p_KxN, _ = _probabilities(_folded(q[:, a:b] * scale, heads), k[:, s:b], mask, cap, sinks)
        out[a:b] = torch.bmm(p_KxN, v[:, s:b]).view(q.shape[0], b - a, -1).transpose(0, 1)
    return out


def _gradients_in_torch(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    window: int,
    cap: float,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v. The probabilities are recomputed block by block.

    With P the probabilities and dP = dO V': dV = P' dO, dS = P * (dP - rowsum(P * dP)), dQ = dS K, dK = dS' Q. With a
    cap c, dS has the factor 1 - tanh(S / c)^2. A sink changes nothing but P, because its own dP is 0.
    """
    heads, causal = k.shape[0], _causal(q)
    grad, q, k, v = grad.transpose(0, 1).contiguous(), q.contiguous(), k.contiguous(), v.contiguous()
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    grad_k, grad_v = (torch.zeros(x.shape, dtype=torch.float32) for x in (k, v))
    for s, a, b in _blocks(cu_seqlens, window):
        q_KxD, grad_KxD = _folded(q[:, a:b] * scale, heads), _folded(grad[:, a:b], heads)
        p_KxN, slope_KxN = _probabilities(q_KxD, k[:, s:b], _mask(causal, window, s, a, b), cap, sinks)
        grad_v[:, s:b] += torch.bmm(p_KxN.transpose(1, 2), grad_KxD)
        grad_p_KxN = torch.bmm(grad_KxD, v[:, s:b].transpose(1, 2))
        grad_s_KxN = torch.ops.aten._softmax_backward_data(grad_p_KxN, p_KxN, -1, q.dtype)
        if slope_KxN is not None:
            grad_s_KxN = (grad_s_KxN * slope_KxN).to(q.dtype)
        grad_q[:, a:b] = torch.bmm(grad_s_KxN, k[:, s:b]).mul_(scale).view(q.shape[0], b - a, -1)
        grad_k[:, s:b] += torch.bmm(grad_s_KxN.transpose(1, 2), q_KxD)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _in_c(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    same = q.dtype == k.dtype == v.dtype
    return same and kernel.reason_against(q.dtype, q.shape[-1]) is None


@operation("packed_attention")
def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    window: int,
    cap: float,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q: [H, T, D]; k, v: [K, T, D]; sinks: [H]. Returns out [T, H, D] and, for the backward pass in C, fp32 [H, T].

    The latter is zeros when computed in torch, whose backward pass doesn't read it. Sinks get no gradient.
    """
    if _in_c(q, k, v):
        return kernel.forward(q, k, v, cu_seqlens, scale, window, cap, sinks)
    out = _attend_in_torch(q, k, v, cu_seqlens, scale, window, cap, sinks)
    return out, q.new_zeros(q.shape[:2], dtype=torch.float32)


@torch.library.register_fake("huarizo::packed_attention")
def _(q: torch.Tensor, *others: object) -> tuple[torch.Tensor, torch.Tensor]:
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
    window: int,
    cap: float,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v. grad, out: [T, H, D]; lse: the second result of the forward pass."""
    if _in_c(q, k, v):
        return kernel.backward(grad, q, k, v, out, lse, cu_seqlens, scale, window, cap)
    return _gradients_in_torch(grad, q, k, v, cu_seqlens, scale, window, cap, sinks)


@torch.library.register_fake("huarizo::packed_attention_backward")
def _(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))  # pyright: ignore


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, cu_seqlens, *ctx.rule, sinks = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, sinks)


def _backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    *tensors, sinks = ctx.saved_tensors
    return (*_attend_backward(grad, *tensors, *ctx.rule, sinks), None, None, None, None, None)


torch.library.register_autograd("huarizo::packed_attention", _backward, setup_context=_save)


WITHOUT_EFFECT = frozenset({
    "position_ids", "cache_position", "use_cache", "logits_to_keep", "num_items_in_batch", "output_hidden_states",
    "return_dict",
})  # fmt: skip
"""Keyword arguments that reach an attention function without changing what it computes."""


def _unknown(module: torch.nn.Module, mask: torch.Tensor | None, kwargs: dict[str, object]) -> list[str]:
    """The arguments that ask for more than there is here: dropout, a bias, a mask, or anything unknown. None, False and
    0 ask for nothing."""
    asked = {"attention_mask": mask, **kwargs}
    causal = asked.pop("is_causal", None)
    odd = [
        name if isinstance(value, torch.Tensor) else f"{name}={value}"
        for name, value in asked.items()
        if name not in WITHOUT_EFFECT and (isinstance(value, torch.Tensor) or value)
    ]
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        odd.append("is_causal=False")
    return odd


def _unusable(window: object, cap: object, sinks: object, heads: int) -> list[str]:
    """Those of a window, a cap and sinks that are none, and sinks that would need a gradient."""
    odd = []
    if not isinstance(window, int) or window < 0:
        odd.append(f"sliding_window={window}")
    if not isinstance(cap, int | float) or not 0 <= cap < math.inf:
        odd.append(f"softcap={cap}")
    if isinstance(sinks, torch.Tensor):
        if sinks.shape != (heads,):
            odd.append(f"s_aux of shape {tuple(sinks.shape)}")
        if sinks.requires_grad and torch.is_grad_enabled():
            odd.append("gradient of s_aux, which must be frozen")
    elif sinks is not None:
        odd.append(f"s_aux={sinks}")
    return odd


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """The attention function that Transformers calls, with its names for a window, a cap and sinks.

    query: [1, H, T, D]; key, value: [1, K, T, D]; cu_seqlens: [n + 1] int32; s_aux: [H]. Returns ([1, T, H, D], None).

    Raises:
        ValueError: `cu_seqlens` is missing. Generation uses Transformers' own attention instead.
        ModelError: the arguments ask for another attention than this one, or for a gradient of the sinks.
    """
    window, cap = sliding_window or 0, softcap or 0.0
    odd = [*_unknown(module, attention_mask, kwargs), *_unusable(window, cap, s_aux, query.shape[1])]
    if odd:
        raise ModelError(f"this model can't be trained here: packed attention has no {', '.join(odd)}")
    if cu_seqlens is None:
        raise ValueError(f"{NAME} needs cu_seqlens; call model.set_attn_implementation('sdpa') to generate")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.device.type == "cpu":
        return _attend(query[0], key[0], value[0], cu_seqlens, scale, window, float(cap), s_aux)[0][None], None
    return _attend_by_example(query, key, value, cu_seqlens, scale, window, cap, s_aux), None  # pyright: ignore[reportCallIssue]


@torch.compiler.disable  # the number and lengths of the examples differ from batch to batch
def _attend_by_example(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    window: int,
    cap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Returns [1, T, H, D]. The CPU reads the boundaries; if they are on a GPU, this synchronizes with it."""
    lengths = cu_seqlens.diff().tolist()
    outputs = [
        _attend_alone(q, k, v, scale, window, cap, sinks)
        for q, k, v in zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _attend_alone(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int,
    cap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of one example by differentiable operations of torch. q: [1, H, T, D]; returns the same shape."""
    length, groups = q.shape[2], q.shape[1] // k.shape[1]
    if cap or sinks is not None:
        ends = torch.tensor([0, length], device=q.device)
        return reference(q[0], k[0], v[0], ends, scale, window, cap, sinks).transpose(0, 1)[None]
    if not window or window >= length:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=groups > 1)
    at_T = torch.arange(length, device=q.device)
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)  # with a mask, its fast kernels want them so
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_seen(at_T, at_T, window), scale=scale)


def no_mask(*args: object, **kwargs: object) -> None:
    """The mask function of `huarizo_packed`, which needs no mask."""


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, no_mask)
