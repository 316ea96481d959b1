"""What every frozen linear layer with a storage of its own can do, so that nobody has to ask which storage it is.

Two things are apart: the storage of the weight, which has a name such as int8, and the dtype of the activations, in
which the layer takes its input and gives its output. Whoever trains, counts or wraps such a layer knows this class;
only storages.py names the ones that there are.
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

# Shapes: T tokens, K input and N output channels.


class FrozenLinear(nn.Module, abc.ABC):
    """x W' + b with a frozen weight W [N, K], differentiable in x alone.

    A base class and not a Protocol: PEFT finds the layers that it wraps by isinstance, and a Protocol's looks for
    names, which nn.Module's `__getattr__` and wrappers that hand names through can make up. Not an nn.Linear, so that
    nothing takes it for one and adds floats to its weight.
    """

    storage: ClassVar[str]
    """The name of the storage, as the recipe's `precision` has it."""
    in_features: int
    """K."""
    out_features: int
    """N."""
    dtype: torch.dtype
    """Of the activations."""
    weight: torch.Tensor
    """What is stored, a buffer in the layout of the storage. PEFT reads its device."""
    bias: torch.Tensor | None
    """b, [N], a buffer."""

    @abc.abstractmethod
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N] in the dtype of x."""

    @abc.abstractmethod
    def input_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """The gradient of the input, [T, K], from that of the output, [T, N], in the dtype of the latter."""

    @abc.abstractmethod
    def dequantised(self) -> torch.Tensor:
        """The weight as it acts: float32 [N, K]."""

    @abc.abstractmethod
    def store(self, weight: torch.Tensor) -> None:
        """Keep another weight, float [N, K]."""

    def count_weights(self) -> int:
        """How many numbers W and b have, whatever the storage adds or packs together."""
        return self.in_features * self.out_features + (0 if self.bias is None else self.out_features)


def input_gradient_of(layer: nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The product that takes the output's gradient [T, N] of a linear layer to its input's [T, K].

    None for a layer that is more than its weight and a bias, such as one with a LoRA: that takes autograd.
    """
    if isinstance(layer, FrozenLinear):
        return layer.input_gradient
    if isinstance(layer, nn.Linear):
        return lambda grad: grad @ layer.weight
    return None


TRACED_AS_ONE: list[Callable[..., Any]] = []
"""The products that the compiler takes as one operation each."""


def traced_as_one(product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Decorates a product of a storage: the compiler takes it as one operation and traces both directions through it.

    Its tensors may come in a NamedTuple.
    """
    TRACED_AS_ONE.append(product)
    torch.compiler.allow_in_graph(product)
    return product
