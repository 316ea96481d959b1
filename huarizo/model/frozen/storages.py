"""The storages of a frozen base other than floats, by their names in the recipe's `precision`.

A new one is a subclass of `FrozenLinear` in a file of its own and an entry here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from huarizo.model.frozen import int8
from huarizo.model.frozen.linear import FrozenLinear


@dataclass(frozen=True, kw_only=True)
class Storage:
    """A way to store the weights of linear layers."""

    quantise: Callable[[Sequence[nn.Linear], torch.Tensor], Sequence[FrozenLinear]]
    """(linears that share one input, peaks) -> their quantised layers. peaks: float32 [K], the largest |x_j| seen of
    each input channel."""
    reason_against: Callable[[torch.device, torch.dtype], str | None]
    """(device, dtype of activations) -> why its products can't be computed there, or not fast; None if they can."""
    bytes_per_weight: float
    """For estimates of memory."""


STORAGES: dict[str, Storage] = {
    "int8": Storage(quantise=int8.quantise, reason_against=int8.reason_against, bytes_per_weight=1),
}
