"""Cross-entropy at labelled positions only, in chunks, so that memory does not grow with the vocabulary.

The full [T, vocabulary] logits never exist. For each chunk of labelled positions the logits, the loss and its gradient
are computed together and the logits are freed. Only the gradient of the hidden states is stored, and the backward pass
scales it.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import BackwardCFunction, FunctionCtx
from transformers import PretrainedConfig, PreTrainedModel

from huarizo.data.packing import PackedBatch, pack_within
from huarizo.model.architectures.registry import architecture_of
from huarizo.model.dropout import at_places
from huarizo.model.frozen.linear import input_gradient_of

# Shapes: T tokens of a packed row, L labelled tokens, C labelled tokens of a chunk; H hidden size, V vocabulary size.

CHUNK_LOGITS = 2**23  # of one chunk: 32 MiB in fp32, small enough for memory allocators to reuse without page faults
CHUNK_LOGITS_ON_GPU = 2**26  # 128 MiB in bf16: products large enough to keep a GPU busy


class LogitRule(NamedTuple):
    """What a model does to its logits before the softmax: cap tanh(scale logits / cap), or only a part of it.

    Both are float32 scalars, tensors because torch.compile (2.13) may compute with a changing number in fewer digits.
    """

    scale: torch.Tensor | None = None
    cap: torch.Tensor | None = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """float32 [..., V] -> float32 [..., V]."""
        scaled = logits if self.scale is None else logits * self.scale
        return scaled if self.cap is None else torch.tanh(scaled / self.cap) * self.cap

    def gradient(self, grad: torch.Tensor, ruled: torch.Tensor) -> torch.Tensor:
        """The gradient of the logits, from that of the result `ruled`. All float32 [..., V]."""
        if self.cap is not None:
            grad = grad * (1 - (ruled / self.cap).square())
        return grad if self.scale is None else grad * self.scale


PLAIN = LogitRule()


def rule_of(config: PretrainedConfig) -> LogitRule:
    """The rule of a model's logits, from its configuration."""
    fields = architecture_of(config).logits
    named = (fields.multiplied_by, fields.divided_by, fields.capped_at)
    times, over, cap = (getattr(config, name, None) if name else None for name in named)
    scale = None if times is over is None else (1.0 if times is None else times) / (1.0 if over is None else over)
    return LogitRule(*(None if number is None else torch.tensor(float(number)) for number in (scale, cap)))


def reference(
    hidden: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor, rule: LogitRule = PLAIN
) -> torch.Tensor:
    """Reference implementation: summed cross-entropy from all logits at once. hidden: [L, H]; targets: [L]."""
    return F.cross_entropy(rule(head(hidden).float()), targets, reduction="sum")


def loss_and_gradient(
    logits: torch.Tensor, targets: torch.Tensor, rule: LogitRule = PLAIN
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy, a float32 scalar, and its gradient: softmax - onehot, for plain logits.

    logits and gradient: [C, V]; targets: [C] int64.

    Written so that torch.compile makes one pass for the sums and one for the gradient.
    """
    x_CV = rule(logits.float())
    largest_C1 = x_CV.amax(-1, keepdim=True)
    log_sum_C1 = (x_CV - largest_C1).exp().sum(-1, keepdim=True).log() + largest_C1
    target_C1 = targets[:, None]
    onehot_CV = torch.arange(x_CV.shape[1], device=x_CV.device) == target_C1
    grad_CV = rule.gradient((x_CV - log_sum_C1).exp() - onehot_CV.float(), x_CV)
    return (log_sum_C1 - x_CV.gather(1, target_C1)).sum(), grad_CV.to(logits.dtype)


Gradient = Callable[[torch.Tensor, torch.Tensor, LogitRule], tuple[torch.Tensor, torch.Tensor]]  # `loss_and_gradient`


class _ChunkedLoss(torch.autograd.Function):
    """Summed loss. The forward pass also computes the gradients of `hidden` and of the head's trainable parameters."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: torch.Tensor,
        head: torch.nn.Module,
        targets: torch.Tensor,
        gradient: Gradient,
        places: torch.Tensor,
        rule: LogitRule,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grads = [torch.zeros_like(parameter) for parameter in parameters]
        input_gradient = None if parameters else input_gradient_of(head)
        rows = _rows(head, hidden.device)
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            if input_gradient is not None:
                loss, grad_logits = gradient(head(hidden[part]), targets[part], rule)
                grad_hidden[part] = input_gradient(grad_logits)
            else:
                with torch.enable_grad(), at_places(head, places[part]):
                    chunk = hidden[part].detach().requires_grad_()
                    loss = reference(chunk, head, targets[part], rule)
                taken = torch.autograd.grad(loss, [chunk, *parameters])
                grad_hidden[part] = taken[0]
                for grad, more in zip(grads, taken[1:], strict=True):
                    grad += more
            total += loss.detach()
        ctx.save_for_backward(grad_hidden, *grads)
        return total

    @staticmethod
    def backward(ctx: BackwardCFunction, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled = [(grad.float() * grad_outputs[0]).to(grad.dtype) for grad in ctx.saved_tensors]  # 1 / labels in fp32
        return scaled[0], None, None, None, None, None, *scaled[1:]


def _rows(head: Any, on: torch.device) -> int:
    """Labelled tokens of a chunk."""
    head = getattr(head, "token_adapter", head)  # PEFT's wrapper of a head whose single rows are trained
    logits = CHUNK_LOGITS_ON_GPU if on.type == "cuda" else CHUNK_LOGITS
    return max(16, logits // head.out_features)


def summed_loss(
    hidden: torch.Tensor,
    head: torch.nn.Module,
    targets: torch.Tensor,
    gradient: Gradient = loss_and_gradient,
    places: torch.Tensor | None = None,
    rule: LogitRule = PLAIN,
) -> torch.Tensor:
    """Sum of the cross-entropies of `targets` given `hidden`.

    Args:
        hidden: [L, H], hidden states after the last norm at the labelled positions, any float dtype.
        head: the output head, [*, H] -> [*, V]; may have trainable parameters (a LoRA).
        targets: [L] int64.
        gradient: `loss_and_gradient`, or its compiled form.
        places: [L] integers, the places of the labelled tokens in the optimizer step, for a dropout before the head.
        rule: what the model does to its logits.

    Returns:
        A float32 scalar. For L = 0 it is zero, and so are its gradients for `hidden` and the head's parameters.
    """
    if not torch.is_grad_enabled():
        return token_losses(hidden, head, targets, rule).sum()
    trainable = [parameter for parameter in head.parameters() if parameter.requires_grad]
    if not len(targets):
        return sum(((tensor * 0).sum().float() for tensor in trainable), (hidden * 0).sum().float())
    places = torch.arange(len(targets), device=targets.device) if places is None else places
    return _ChunkedLoss.apply(hidden, head, targets, gradient, places, rule, *trainable)  # pyright: ignore[reportReturnType]


@torch.no_grad()
def token_losses(
    hidden: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor, rule: LogitRule = PLAIN
) -> torch.Tensor:
    """The cross-entropy of each of `targets` [L] given `hidden` [L, H], in chunks: float32 [L], without gradient."""
    rows = _rows(head, hidden.device)
    parts = zip(hidden.split(rows), targets.split(rows), strict=True)
    losses = [F.cross_entropy(rule(head(part).float()), wanted, reduction="none") for part, wanted in parts]
    return torch.cat(losses) if losses else torch.zeros(0, device=hidden.device)


class PackedLoss:
    """The summed loss of packed batches (see `huarizo.data.packing`).

    base: the causal model, inside any wrapper; compiled: whether the gradient of the logits is compiled.
    """

    within = staticmethod(pack_within)

    def __init__(self, base: PreTrainedModel, compiled: bool = False) -> None:
        self.base, self.rule = base, rule_of(base.config)
        self.gradient: Gradient = torch.compile(loss_and_gradient, dynamic=True) if compiled else loss_and_gradient

    @property
    def head(self) -> torch.nn.Module:
        """The output head, or the adapter layer that replaced it."""
        head = self.base.get_output_embeddings()
        assert head is not None
        return head

    def __call__(self, model: torch.nn.Module, batch: PackedBatch) -> torch.Tensor:
        """The loss of a batch, a float32 scalar. `model` is the base or wraps it."""
        hidden_LH, places_L = self._labelled(model, batch), batch.places[batch.label_positions]
        on = hidden_LH.device
        return summed_loss(hidden_LH, self.head, batch.targets.to(on), self.gradient, places_L.to(on), self.rule)

    def by_token(self, model: torch.nn.Module, batch: PackedBatch) -> torch.Tensor:
        """The loss of each labelled token of a batch: [L] float32, without gradient."""
        with torch.no_grad():
            hidden_LH = self._labelled(model, batch)
            return token_losses(hidden_LH, self.head, batch.targets.to(hidden_LH.device), self.rule)

    def _labelled(self, model: torch.nn.Module, batch: PackedBatch) -> torch.Tensor:
        """Hidden states at the labelled positions, [L, H], on the head's device, which may differ from the inputs'.

        The whole model runs, so that wrappers such as DDP take part, but its head is asked for no position.
        """
        nothing = torch.empty(0, dtype=torch.long, device=batch.input_ids.device)
        with _last_hidden(self.base) as states:
            model(**batch.model_inputs(), logits_to_keep=nothing, use_cache=False)
        head, hidden_TH = self.head, states[0][0]
        hidden_LH = hidden_TH[batch.label_positions.to(hidden_TH.device)]
        return hidden_LH.to(next(itertools.chain(head.parameters(), head.buffers())).device)


@contextmanager
def _last_hidden(base: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Collects the hidden states after the last norm, [1, T, H], of each forward pass inside the block."""
    states: list[torch.Tensor] = []
    handle = base.base_model.register_forward_hook(lambda module, args, output: states.append(output.last_hidden_state))
    try:
        yield states
    finally:
        handle.remove()
