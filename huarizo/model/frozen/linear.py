"""The interface of every frozen linear layer whose weight is not a plain float tensor, independent of the storage.

The storage of the weight, which has a name such as int8, and the dtype of the activations, which is that of the layer's
input and output, are separate. Code that trains, counts or wraps such a layer knows only this class; only storages.py
names its subclasses.
"""

import abc
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

# Shapes: T tokens, K input and N output channels.


class LowRank(NamedTuple):
    """The term h up' that a LoRA adds to a layer's output, differentiable in h and up."""

    h: torch.Tensor
    """[..., r], in the dtype of the activations."""
    up: torch.Tensor
    """float32 [N, r], with the LoRA's scale."""

    def product(self) -> torch.Tensor:
        """[..., N], in the dtype of h."""
        return F.linear(self.h, self.up.to(self.h.dtype))


class FrozenLinear(nn.Module, abc.ABC):
    """x W' + b with a frozen weight W [N, K], differentiable in x only.

    A base class and not a Protocol: PEFT finds the layers to wrap by isinstance, and a Protocol's isinstance looks up
    attributes, which nn.Module's `__getattr__` and forwarding wrappers can fake. Not an nn.Linear, so that no code adds
    floats to its weight.
    """

    storage: ClassVar[str]
    """The name of the storage, a value of the recipe's `precision`."""
    in_features: int
    """K."""
    out_features: int
    """N."""
    dtype: torch.dtype
    """Of the activations."""
    weight: torch.Tensor
    """The stored weight, a buffer in the layout of the storage. PEFT reads its device."""
    bias: torch.Tensor | None
    """b, [N], a buffer."""
    peaks: torch.Tensor | None = None
    """float32 [K] on the CPU, the peaks of the input that it was quantised with; one object for all layers that share
    the input."""

    @abc.abstractmethod
    def forward(self, x: torch.Tensor, low_rank: LowRank | None = None) -> torch.Tensor:
        """[..., K] -> [..., N] in the dtype of x, with the term of a LoRA added."""

    @abc.abstractmethod
    def input_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """The gradient of the input, [T, K], from that of the output, [T, N], in the dtype of the latter."""

    @abc.abstractmethod
    def dequantised(self) -> torch.Tensor:
        """The weight as it acts: float32 [N, K]."""

    @abc.abstractmethod
    def store(self, weight: torch.Tensor) -> None:
        """Replace the weight, float [N, K]."""

    def count_weights(self) -> int:
        """The number of elements in W and b, whatever the storage adds or packs."""
        return self.in_features * self.out_features + (0 if self.bias is None else self.out_features)


def input_gradient_of(layer: nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The product that maps a linear layer's output gradient [T, N] to its input gradient [T, K].

    None for a layer with more than a weight and a bias, such as a LoRA, which needs autograd.
    """
    if isinstance(layer, FrozenLinear):
        return layer.input_gradient
    if isinstance(layer, nn.Linear):
        return lambda grad: grad @ layer.weight
    return None


TRACED_AS_ONE: list[Callable[..., torch.Tensor]] = []
"""The products that the compiler treats as single operations."""


def traced_as_one(product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Decorates a storage's product: the compiler treats it as a single operation, in both directions.

    It takes tensors, numbers and None as they are: torch 2.11 compiles no NamedTuple of them.
    """
    TRACED_AS_ONE.append(product)
    torch.compiler.allow_in_graph(product)
    return product
