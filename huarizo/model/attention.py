"""Causal attention over packed examples, each fully isolated, registered with Transformers as `huarizo_packed`.

`cu_seqlens` marks the examples of a packed row; it is passed through the model's keyword arguments. Each example is
computed on its own slice, so there is no mask of the whole row, and no example's values depend on another's. Sliding
windows, soft caps of the scores and attention sinks are computed too; anything else that a model asks for is refused.
It needs no FlashAttention and runs on every device. On a CPU it uses the C kernel where kernels/attention.py has one,
and otherwise batched products on blocks that fit the cache, which at the lengths of instruction data are several times
as fast as torch's own CPU kernel. On an NVIDIA GPU it uses torch's kernels for examples of different lengths
(kernels/variable_length.py) where they have all that is asked for, and otherwise products on larger blocks.
Seen with transformers 5.17 to 5.23; tests/model/test_attention.py fails when the hooks move.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from huarizo.errors import ModelError
from huarizo.kernels import attention as kernel
from huarizo.kernels import variable_length
from huarizo.kernels.operations import operation

NAME = "huarizo_packed"
BLOCK = 64  # queries at a time: the scores of a block fit the cache, and keys above the diagonal are skipped
BLOCK_ON_GPU = 512

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


def _is_read(cu_seqlens: torch.Tensor) -> bool:
    """Whether the CPU reads the boundaries of the examples. Those on a GPU are not, because that would wait for it."""
    return cu_seqlens.device.type == "cpu"


def _blocks(cu_seqlens: torch.Tensor, tokens: int, window: int) -> Iterator[tuple[int, int, int]]:
    """(s, a, b) for each block of queries: the first key that one of them may see, its own start, and its end.

    Where the boundaries are not read, the blocks are those of the whole row.
    """
    if not _is_read(cu_seqlens):
        yield from ((0, a, min(a + BLOCK_ON_GPU, tokens)) for a in range(0, tokens, BLOCK_ON_GPU))
        return
    for s, e in itertools.pairwise(cu_seqlens.tolist()):
        for a in range(s, e, BLOCK):
            yield max(s, a - window + 1) if window else s, a, min(a + BLOCK, e)


def _folded(states: torch.Tensor, heads: int) -> torch.Tensor:
    """[H, B, D] -> [K, x, D]: the queries that share a key/value head, stacked."""
    return states.reshape(heads, -1, states.shape[-1])


class _Masks:
    """The masks of `_blocks`, in the dtype and on the device of `like`; -inf where a key is not seen."""

    def __init__(self, like: torch.Tensor, cu_seqlens: torch.Tensor, tokens: int, window: int) -> None:
        self.like, self.window = like, window
        self.example_T = None
        if _is_read(cu_seqlens):
            self.causal = like.new_full((BLOCK, BLOCK), -math.inf).triu(1)
        else:
            at_T = torch.arange(tokens, device=like.device)
            self.example_T = torch.searchsorted(cu_seqlens[1:], at_T, right=True)

    def __call__(self, s: int, a: int, b: int) -> torch.Tensor:
        """[B, N] for a block, or its last columns, before which all keys are seen."""
        within = not self.window or b - s <= self.window
        if self.example_T is None and within:
            return self.causal[: b - a, : b - a]
        rows, columns = (torch.arange(start, b, device=self.like.device) for start in (a, s))
        seen_BN = _seen(rows, columns, self.window)
        if self.example_T is not None:
            seen_BN &= self.example_T[a:b, None] == self.example_T[None, s:b]
        return self.like.new_zeros(seen_BN.shape).masked_fill_(~seen_BN, -math.inf)


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
    heads, tokens = k.shape[:2]
    masks = _Masks(q, cu_seqlens, tokens, window)
    q, k, v = (x.contiguous() for x in (q, k, v))  # with other strides torch rounds some products differently
    out = q.new_empty(q.shape[1], q.shape[0], q.shape[2])
    for s, a, b in _blocks(cu_seqlens, tokens, window):
        p_KxN, _ = _probabilities(_folded(q[:, a:b] * scale, heads), k[:, s:b], masks(s, a, b), cap, sinks)
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
    heads, tokens = k.shape[:2]
    masks = _Masks(q, cu_seqlens, tokens, window)
    grad, q, k, v = grad.transpose(0, 1).contiguous(), q.contiguous(), k.contiguous(), v.contiguous()
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    wide = torch.promote_types(k.dtype, torch.float32)
    grad_k, grad_v = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
    for s, a, b in _blocks(cu_seqlens, tokens, window):
        q_KxD, grad_KxD = _folded(q[:, a:b] * scale, heads), _folded(grad[:, a:b], heads)
        p_KxN, slope_KxN = _probabilities(q_KxD, k[:, s:b], masks(s, a, b), cap, sinks)
        grad_v[:, s:b] += torch.bmm(p_KxN.transpose(1, 2), grad_KxD)
        grad_p_KxN = torch.bmm(grad_KxD, v[:, s:b].transpose(1, 2))
        grad_s_KxN = torch.ops.aten._softmax_backward_data(grad_p_KxN, p_KxN, -1, q.dtype)
        if slope_KxN is not None:
            grad_s_KxN = (grad_s_KxN * slope_KxN).to(q.dtype)
        grad_q[:, a:b] = torch.bmm(grad_s_KxN, k[:, s:b]).mul_(scale).view(q.shape[0], b - a, -1)
        grad_k[:, s:b] += torch.bmm(grad_s_KxN.transpose(1, 2), q_KxD)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _in_c(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    same = q.device.type == "cpu" and q.dtype == k.dtype == v.dtype
    return same and kernel.reason_against(q.dtype, q.shape[-1]) is None


@operation("packed_attention", "default")
def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
    scale: float,
    window: int,
    cap: float,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q: [H, T, D]; k, v: [K, T, D]; longest: tokens of the longest example; sinks: [H].

    Returns out [T, H, D] and what the backward pass of a kernel needs, fp32: [H, T], or `variable_length.saved_shape`.
    Without a kernel that is zeros. Sinks get no gradient.
    """
    if _in_c(q, k, v):
        return kernel.forward(q, k, v, cu_seqlens, scale, window, cap, sinks)
    if on_card := variable_length.kernel_for(q, cap, sinks):
        return variable_length.forward(on_card, q, k, v, cu_seqlens, longest, scale, window)
    out = _attend_in_torch(q, k, v, cu_seqlens, scale, window, cap, sinks)
    return out, q.new_zeros(q.shape[:2], dtype=torch.float32)


@torch.library.register_fake("huarizo::packed_attention")
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
    scale: float,
    window: int,
    cap: float,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    saved = q.shape[:2]
    if on_card := variable_length.kernel_for(q, cap, sinks):
        saved = variable_length.saved_shape(on_card, q, cu_seqlens, longest)
    return q.new_empty(q.shape[1], q.shape[0], q.shape[2]), q.new_empty(saved, dtype=torch.float32)


@operation("packed_attention_backward", "default")
def _attend_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    saved: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
    scale: float,
    window: int,
    cap: float,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v. grad, out: [T, H, D]; saved: the second result of the forward pass."""
    if _in_c(q, k, v):
        return kernel.backward(grad, q, k, v, out, saved, cu_seqlens, scale, window, cap)
    if on_card := variable_length.kernel_for(q, cap, sinks):
        return variable_length.backward(on_card, grad, q, k, v, out, saved, cu_seqlens, longest, scale, window)
    return _gradients_in_torch(grad, q, k, v, cu_seqlens, scale, window, cap, sinks)


@torch.library.register_fake("huarizo::packed_attention_backward")
def _(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    saved: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
    scale: float,
    window: int,
    cap: float,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if variable_length.kernel_for(q, cap, sinks):
        by_token = (x.new_empty(x.shape[1], x.shape[0], x.shape[2]) for x in (q, k, v))
        return tuple(x.transpose(0, 1) for x in by_token)  # pyright: ignore[reportReturnType]
    return tuple(x.new_empty(x.shape) for x in (q, k, v))  # pyright: ignore[reportReturnType]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, cu_seqlens, *ctx.rule, sinks = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, sinks)


def _backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    *tensors, sinks = ctx.saved_tensors
    return (*_attend_backward(grad, *tensors, *ctx.rule, sinks), *(None,) * 6)


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
    longest: int | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """The attention function that Transformers calls, with its names for a window, a cap and sinks.

    query: [1, H, T, D]; key, value: [1, K, T, D]; cu_seqlens: [n + 1] int32; longest: tokens of the longest example;
    s_aux: [H]. Returns ([1, T, H, D], None).

    Raises:
        ValueError: `cu_seqlens` or `longest` is missing. Generation uses Transformers' own attention instead.
        ModelError: the arguments ask for another attention than this one, or for a gradient of the sinks.
    """
    window, cap = sliding_window or 0, softcap or 0.0
    odd = [*_unknown(module, attention_mask, kwargs), *_unusable(window, cap, s_aux, query.shape[1])]
    if odd:
        raise ModelError(f"this model can't be trained here: packed attention has no {', '.join(odd)}")
    if cu_seqlens is None or longest is None:
        raise ValueError(f"{NAME} needs cu_seqlens and longest; call model.set_attn_implementation('sdpa') to generate")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rule = (scale, window, float(cap), s_aux)
    return _attend(query[0], key[0], value[0], cu_seqlens, longest, *rule)[0][None], None


def no_mask(*args: object, **kwargs: object) -> None:
    """The mask function of `huarizo_packed`, which needs no mask."""


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, no_mask)
