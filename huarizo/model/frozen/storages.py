"""The storages that a frozen base can be kept in instead of floats, by the names that the recipe's `precision` has.

A new one is a subclass of `FrozenLinear` in a file of its own and a row here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from huarizo.model.frozen import int8
from huarizo.model.frozen.linear import FrozenLinear


@dataclass(frozen=True, kw_only=True)
class Storage:
    """A way to keep the weights of linear layers."""

    quantise: Callable[[Sequence[nn.Linear], torch.Tensor], Sequence[FrozenLinear]]
    """Makes the layers for linears that share one input from them and its peaks: float32 [K], the largest |x_j| seen
    of each input channel."""
    bytes_per_weight: float
    """Of memory, for estimates."""


STORAGES: dict[str, Storage] = {
    "int8": Storage(quantise=int8.quantise, bytes_per_weight=1),
}
