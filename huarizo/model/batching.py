"""How examples go through a model: packed where that is known to be exact for it, otherwise padded, by its own code.

What is known of an architecture is checked in the loaded model before the first step. A few short rows are computed one
by one with the model's own attention and logits, which defines what is right, and then batched as planned. Where the
losses differ the next batching is taken, down to one row at a time.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, get_args

import torch
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel

from huarizo.data.packing import pack
from huarizo.data.padding import SLACK, Within, pad
from huarizo.data.tokens import Example
from huarizo.errors import ModelError
from huarizo.machine import is_out_of_memory
from huarizo.model.architectures.registry import architecture_of
from huarizo.model.attention import NAME as PACKED_ATTENTION
from huarizo.model.compile import uncompiled
from huarizo.model.frozen.linear import FrozenLinear
from huarizo.model.loss import PackedLoss
from huarizo.model.padded_loss import PaddedLoss
from huarizo.plan import Batching
from huarizo.wording import first_line

CHECKED_ROWS, LONGEST = 2, 24  # the longest in tokens
SHARES = 1.0, 0.45  # of LONGEST, the rows' lengths
BARS = {torch.float32: 5e-5, torch.float16: 0.02, torch.bfloat16: 0.05}
"""The largest relative difference of the tokens' losses that is rounding, by the dtype of activations.

Measured on SmolLM2 135M, packed: 1.2e-6 in fp32 and 1.7e-2 in bf16; with attention's scale wrong by a tenth 2.5e-2, by
half 0.11, and with examples that see each other 0.49, in each dtype. In fp32 right architectures stay below 1.4e-6, and
wrong ones differ from 3.5e-4 on.
"""
INT8_BAR = 0.05  # with linear layers in int8, whose roundings flip: 1.1e-2 on that model

IN_WORDS: dict[Batching, str] = {
    "packed": "packed without padding",
    "padded": f"padded by at most {SLACK:.0%}, with the model's own attention",
    "alone": "one example each, with the model's own attention",
}


class BatchLoss(Protocol):
    """The loss of a model's examples in a batching: a `PackedLoss` or a `PaddedLoss`. Each takes its own batches."""

    @property
    def within(self) -> Within:
        """Cuts examples into its batches."""
        ...

    def __call__(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """The summed loss of a batch, a float32 scalar. `model` is the base or wraps it."""
        ...

    def by_token(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """The loss of each labelled token of a batch: [L] float32, without gradient."""
        ...


def planned_batching(config: Mapping[str, Any] | PretrainedConfig) -> tuple[Batching, str]:
    """How a model's examples are batched, and why, from the content of config.json or Transformers' configuration."""
    architecture = architecture_of(config)
    if architecture.packs:
        return "packed", f"{architecture.model_type} is known to keep packed examples apart"
    if not architecture.pads:
        return "alone", f"{architecture.model_type} is known to change examples that are padded"
    return "padded", f"{architecture.model_type} is not known to keep packed examples apart"


def losses_of(base: PreTrainedModel, batching: Batching, compiled: bool = False) -> BatchLoss:
    """The loss of a causal model's examples in this batching. The model takes the attention that it needs.

    base: the causal model, inside any wrapper; compiled: whether the gradient of the logits is compiled.
    """
    if batching == "packed":
        base.set_attn_implementation(PACKED_ATTENTION)
        return PackedLoss(base, compiled)
    return PaddedLoss(base, alone=batching == "alone")


@dataclass(frozen=True)
class Checked:
    """The batching to use, and what is wrong with the planned one and those after it, in words."""

    batching: Batching
    faults: list[str]


@torch.no_grad()
def check_batching(model: PeftModel, planned: Batching, examples: Sequence[Example]) -> Checked:
    """Find the first batching, from the planned one on, that has the losses of the model's own code.

    They are compared on a few short rows. Nothing changes but the model's attention, which is the one that the batching
    needs. No random number is drawn.

    examples: the first examples of the data, at least one.

    Raises:
        ModelError: the model's own code fails.
    """
    base, was_training = base_of(model), model.training
    model.eval()
    with uncompiled():
        checked = _first_right(model, base, planned, _short(examples))
    model.train(was_training)
    losses_of(base, checked.batching)
    return checked


def _first_right(model: PeftModel, base: PreTrainedModel, planned: Batching, rows: Sequence[Example]) -> Checked:
    try:
        right_L = _token_losses(model, base, "alone", rows)
    except Exception as error:  # anything that a model's code raises
        raise _failure(base, error) from None
    faults, bar, every = list[str](), _bar(base), get_args(Batching)
    for batching in every[every.index(planned) : -1]:
        fault = _fault(model, base, batching, rows, right_L, bar)
        if not fault:
            return Checked(batching, faults)
        faults.append(fault)
    return Checked("alone", faults)


def require_gradients(model: PeftModel, batching: Batching, examples: Sequence[Example]) -> None:
    """Check that the gradients of a few short rows reach the adapter. They are removed again.

    Raises:
        ModelError: they don't, or the model's own code fails.
    """
    base, was_training = base_of(model), model.training
    losses = losses_of(base, batching)
    model.eval()
    try:
        with uncompiled():
            for batch in losses.within(LONGEST, _short(examples), None):
                loss = losses(model, batch.to(base.device))
                if loss.requires_grad:
                    loss.backward()
    except Exception as error:  # anything that a model's code raises
        raise _failure(base, error) from None
    model.train(was_training)
    reached = any(p.grad is not None and p.grad.any() for p in model.parameters())
    model.zero_grad()
    if not reached:
        raise ModelError(
            f"Transformers' {type(base).__name__} passes no gradient to the LoRA. Set other lora.target_modules"
        )


def _failure(base: PreTrainedModel, error: Exception) -> Exception:
    """The error to raise where a model's own code raised this one."""
    if is_out_of_memory(error):
        return error
    return ModelError(f"Transformers' {type(base).__name__} can't be trained on a few rows: {first_line(error)}")


def base_of(model: PeftModel) -> PreTrainedModel:
    """The causal model inside a PeftModel."""
    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    return base


def _short(examples: Sequence[Example]) -> list[Example]:
    """As many short examples as there are SHARES, of different lengths, with all tokens learnt."""
    found = []
    for share, example in zip(SHARES, itertools.cycle(examples), strict=False):
        ids = torch.as_tensor(example.input_ids).tolist()
        length = max(2, round(share * min(LONGEST, len(ids))))
        found.append(Example(ids[:length], ids[:length]))
    return found


def _bar(base: PreTrainedModel) -> float:
    stored = any(isinstance(module, FrozenLinear) for module in base.modules())
    return max(BARS[base.dtype], INT8_BAR if stored else 0.0)


def _token_losses(model: PeftModel, base: PreTrainedModel, batching: Batching, rows: Sequence[Example]) -> torch.Tensor:
    """The loss of each token of the rows that has one before it, in their order: float32 [L] on the CPU."""
    losses = losses_of(base, batching)
    batches: list[Any] = [pack(rows)] if batching == "packed" else [pad(rows)]
    if batching == "alone":
        batches = [pad([row]) for row in rows]
    return torch.cat([losses.by_token(model, batch.to(base.device)).cpu() for batch in batches])


def _fault(
    model: PeftModel,
    base: PreTrainedModel,
    batching: Batching,
    rows: Sequence[Example],
    right_L: torch.Tensor,
    bar: float,
) -> str:
    """What is wrong with a batching, in words; "" if nothing is."""
    try:
        losses_L = _token_losses(model, base, batching, rows)
    except Exception as error:  # anything that a model's code raises
        if is_out_of_memory(error):
            raise
        return f"{batching} rows can't be computed ({first_line(error)})"
    size = max(float(right_L.norm()), len(right_L) ** 0.5)  # a text known by heart has losses near 0
    if float((losses_L - right_L).norm()) <= bar * size:
        return ""
    ours, right = float(losses_L.mean()), float(right_L.mean())
    return f"{batching} rows have a loss of {ours:.6f} a token, and {right:.6f} one by one with the model's own code"
