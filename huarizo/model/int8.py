"""A frozen linear layer in int8 whose forward and input-gradient products both run as int8 GEMMs.

The weight is stored once, in int8 with one scale an output channel, and serves both products: the channel scales are
multiplied into the incoming gradient before that is quantised, so nothing is transposed and nothing kept twice.
Activations and gradients are quantised as they come, one scale a token. Plain int8 ruins a Llama, because a few input
channels are hundreds of times larger than the rest. Two things mend it (tests/model/test_int8.py holds the figures):

- smoothing moves the spread of the activations into the weight, where it does less harm: input channel j is divided
  by s_j = max|x_j|^0.5 / max|w_j|^0.5 and weight column j multiplied by it (SmoothQuant, arXiv 2211.10438);
- the FLOAT_CHANNELS input channels that still stand out stay in floating point (LLM.int8(), arXiv 2208.07339).

The output head is not made int8: the gradient of the softmax is one large entry among tens of thousands of tiny ones,
which one scale a row wipes out.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

FLOAT_CHANNELS = 32
SMALLEST = 1e-12  # scale of a row of zeros

# Shapes: T tokens, K input and N output channels, k float channels.


def quantise_rows(x_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 with one scale a row: float32 [T, K] -> int8 [T, K], float32 [T, 1]."""
    scale = x_TK.abs().amax(-1, keepdim=True).clamp_min(SMALLEST) * (1 / 127)
    return torch.round(x_TK * (1 / scale)).to(torch.int8), scale


def int8_product(a_MK: torch.Tensor, b_KN: torch.Tensor) -> torch.Tensor:
    """int8 [M, K] times int8 [K, N], exact in int32 [M, N]; either may be a transposed view.

    cuBLASLt wants more than 16 rows, and K and N in multiples of 8: fewer rows are filled up with zeros.
    """
    rows = a_MK.shape[0]
    if a_MK.device.type == "cuda" and rows <= 16:
        return torch.ops.aten._int_mm(F.pad(a_MK, (0, 0, 0, 17 - rows)), b_KN)[:rows]
    return torch.ops.aten._int_mm(a_MK, b_KN)


class _Int8Product(torch.autograd.Function):
    """y = x W', with the gradient for x alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        inverse_smoothing: torch.Tensor,
        float_channels: torch.Tensor,
        float_weight: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, scale, inverse_smoothing, float_channels, float_weight)
        x_int8, x_scale = quantise_rows(x.float() * inverse_smoothing)
        outliers = x[:, float_channels] @ float_weight.t()
        return (int8_product(x_int8, weight.t()).float() * x_scale * scale + outliers.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, scale, inverse_smoothing, float_channels, float_weight = ctx.saved_tensors
        grad = grads[0]
        grad_int8, grad_scale = quantise_rows(grad.float() * scale)
        grad_x = (int8_product(grad_int8, weight).float() * grad_scale * inverse_smoothing).to(grad.dtype)
        return grad_x.index_copy(1, float_channels, grad @ float_weight), None, None, None, None, None


@torch.compiler.allow_in_graph  # the compiler takes it as one operation and traces both directions through it
def int8_linear(
    x_TK: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    inverse_smoothing: torch.Tensor,
    float_channels: torch.Tensor,
    float_weight: torch.Tensor,
) -> torch.Tensor:
    """[T, K] -> [T, N] in the dtype of x, differentiable in x; the others are those of an `Int8Linear`."""
    return _Int8Product.apply(x_TK, weight, scale, inverse_smoothing, float_channels, float_weight)  # pyright: ignore


class Int8Linear(nn.Module):
    """x W' + b with a frozen int8 weight.

    weight: int8 [N, K], zero in the float channels; scale: float32 [N]; inverse_smoothing: float32 [K], 1 / s_j, zero
    in the float channels; float_channels: int64 [k], ascending; float_weight: [N, k] in the activations' dtype.
    Not an nn.Linear, so that nothing takes it for one and adds floats to its int8 weight.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    inverse_smoothing: torch.Tensor
    float_channels: torch.Tensor
    float_weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear, inverse_smoothing: torch.Tensor, float_channels: torch.Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.register_buffer("weight", torch.empty(linear.weight.shape, dtype=torch.int8, device=linear.weight.device))
        self.register_buffer("scale", torch.empty(self.out_features, device=linear.weight.device))
        self.register_buffer("inverse_smoothing", inverse_smoothing)
        self.register_buffer("float_channels", float_channels)
        self.register_buffer("float_weight", linear.weight.detach()[:, float_channels].clone())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        self.store(linear.weight.detach())

    def store(self, weight: torch.Tensor) -> None:
        """Quantise a weight, float [N, K], with the smoothing and the float channels that there are."""
        smoothing = torch.where(self.inverse_smoothing > 0, 1 / self.inverse_smoothing, 0)
        smoothed = weight.float() * smoothing
        self.scale.copy_(smoothed.abs().amax(1).clamp_min(SMALLEST) / 127)
        self.weight.copy_(torch.round(smoothed / self.scale[:, None]).to(torch.int8))
        self.float_weight.copy_(weight[:, self.float_channels])

    def dequantised(self) -> torch.Tensor:
        """The weight as it acts: float32 [N, K]."""
        weight = self.weight.float() * self.scale[:, None] * self.inverse_smoothing
        return weight.index_copy(1, self.float_channels, self.float_weight.float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N] in the dtype of x."""
        tokens = x.flatten(0, -2)
        y = int8_linear(
            tokens, self.weight, self.scale, self.inverse_smoothing, self.float_channels, self.float_weight
        ).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, float_channels={len(self.float_channels)}"


def reference(x: torch.Tensor, layer: Int8Linear) -> torch.Tensor:
    """The definition of correct: the same roundings in float64, the products exact.

    x: [T, K]; returns float64 [T, N].

    """
    scaled = x.double() * layer.inverse_smoothing.double()
    step = scaled.abs().amax(-1, keepdim=True).clamp_min(SMALLEST) / 127
    weight = layer.weight.double() * layer.scale.double()[:, None]
    y = (
        torch.round(scaled / step) * step @ weight.t()
        + x.double()[:, layer.float_channels] @ layer.float_weight.double().t()
    )
    return y if layer.bias is None else y + layer.bias.double()


def reference_gradient(grad: torch.Tensor, layer: Int8Linear) -> torch.Tensor:
    """The definition of correct of the input gradient. grad: [T, N]; returns float64 [T, K]."""
    scaled = grad.double() * layer.scale.double()
    step = scaled.abs().amax(-1, keepdim=True).clamp_min(SMALLEST) / 127
    grad_x = torch.round(scaled / step) * step @ layer.weight.double() * layer.inverse_smoothing.double()
    return grad_x.index_copy(1, layer.float_channels, grad.double() @ layer.float_weight.double())


def quantise(linears: Sequence[nn.Linear], peaks: torch.Tensor) -> list[Int8Linear]:
    """Int8 layers for linears that share one input, so that they share its quantised form as well.

    peaks: float32 [K], the largest |x_j| seen of each input channel. The layers hold the very same tensors for
    smoothing and float channels, by which a compiler sees that the quantised input is one value, and computes it once.
    """
    weights = torch.stack([linear.weight.detach().abs().amax(0).float() for linear in linears]).amax(0)
    smoothing = (peaks.clamp_min(1e-5) / weights.clamp_min(1e-5)).sqrt()
    count = min(FLOAT_CHANNELS, len(peaks) // 4)
    float_channels = (peaks / smoothing).topk(count).indices.sort().values
    inverse_smoothing = (1 / smoothing).index_fill(0, float_channels, 0)
    return [Int8Linear(linear, inverse_smoothing, float_channels) for linear in linears]
