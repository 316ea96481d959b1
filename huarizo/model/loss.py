"""Cross-entropy at labelled positions only, in chunks, so that memory does not grow with the vocabulary.

The whole [T, vocabulary] logits are never made. For each chunk of labelled positions the logits are computed, the loss
and its gradient are taken at once, and the logits are let go; the backward pass only scales what is kept, which is one
gradient of the hidden states.
"""

from typing import Any

import torch
import torch.nn.functional as F

CHUNK = 256  # labelled positions whose logits exist at the same time


def reference(hidden: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor) -> torch.Tensor:
    """The definition of correct: the summed cross-entropy from all logits at once. hidden: [L, H]; targets: [L]."""
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum")


class _ChunkedLoss(torch.autograd.Function):
    """Summed loss; gradients for `hidden` and for the head's own trainable parameters, taken in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: Any, targets: torch.Tensor, *parameters: torch.Tensor
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grads = [torch.zeros_like(parameter) for parameter in parameters]
        for start in range(0, len(targets), CHUNK):
            part = slice(start, start + CHUNK)
            with torch.enable_grad():
                chunk = hidden[part].detach().requires_grad_()
                loss = reference(chunk, head, targets[part])
            total += loss.detach()
            taken = torch.autograd.grad(loss, [chunk, *parameters])
            if grad_hidden is not None:
                grad_hidden[part] = taken[0]
            for grad, more in zip(grads, taken[1:], strict=True):
                grad += more
        ctx.save_for_backward(grad_hidden, *grads)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, *grads = ctx.saved_tensors
        scaled = [None if grad is None else grad * grad_outputs[0].to(grad.dtype) for grad in (grad_hidden, *grads)]
        return scaled[0], None, None, *scaled[1:]


def summed_loss(hidden: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropies of `targets` given `hidden`.

    Args:
        hidden: [L, H], hidden states behind the last norm at the labelled positions, any float dtype.
        head: the output head, [*, H] -> [*, vocabulary]; may hold trainable parameters (a LoRA).
        targets: [L] int64.

    Returns:
        A scalar, float32; zero (and still differentiable) for L = 0.
    """
    if not len(targets):
        return hidden.sum().float() * 0
    if not torch.is_grad_enabled():
        parts = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
        return torch.stack([reference(part, head, wanted) for part, wanted in parts]).sum()
    trainable = [parameter for parameter in head.parameters() if parameter.requires_grad]
    return _ChunkedLoss.apply(hidden, head, targets, *trainable)  # pyright: ignore[reportReturnType]


def packed_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor], head: torch.nn.Module) -> torch.Tensor:
    """Summed loss of a packed batch (see `huarizo.data.packing.pack`).

    The model runs as a whole, so that wrappers such as DDP take part, but with no position asked of its head; the loss
    is made from the hidden states. `model` may be wrapped; `head` is the base model's output head.
    """
    nothing = torch.empty(0, dtype=torch.long, device=batch["input_ids"].device)
    output = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        cu_seqlens=batch["cu_seqlens"],
        logits_to_keep=nothing,
        output_hidden_states=True,
        use_cache=False,
    )
    return summed_loss(output.hidden_states[-1][0, batch["label_positions"]], head, batch["targets"])
