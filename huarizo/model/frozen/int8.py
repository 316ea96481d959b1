"""A frozen linear layer in int8 whose forward and input-gradient products both run as int8 GEMMs.

The weight is stored once, in int8 with one scale per output channel, and serves both products: the incoming gradient
is multiplied by the channel scales before it is quantised, so nothing is transposed or stored twice. Activations and
gradients are quantised dynamically, with one scale per token. Plain int8 ruins a model, because a few input channels
are hundreds of times larger than the rest. Three things prevent that (tests/model/frozen/test_int8.py has the figures):

- Smoothing moves the spread of the activations into the weight, where it does less harm: input channel j is divided
  by s_j = max|x_j|^0.5 / max|w_j|^0.5, and weight column j is multiplied by it (SmoothQuant, arXiv 2211.10438).
- The FLOAT_CHANNELS input channels that still stand out stay in floating point (LLM.int8(), arXiv 2208.07339).
- Rotation by Hadamard matrices, within blocks of BLOCK channels, spreads the remaining outliers over their neighbours
  (QuaRot, arXiv 2404.00456). Inputs and outputs are both rotated, so that both activations and gradients benefit.
  With H H = BLOCK I, x and y the smoothed input and the output, and the stored weight Q = (H / BLOCK) W (H / BLOCK):
  y = ((x H) Q') H and grad_x = ((grad_y H) Q) H.

Gradients are rounded stochastically: up with the probability of their fractional part. Rounding to nearest would lose
the many small gradients beside a few large ones, such as the softmax's, and their sum with them. The random numbers of
a row are derived from its scale and signs, so a row always gives the same integers, and different rows get different
random numbers.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from huarizo.kernels import dropout as thin
from huarizo.kernels import int8 as kernel
from huarizo.kernels import int8_gpu
from huarizo.kernels.operations import operation
from huarizo.kernels.tiers import torch_int8
from huarizo.model.dropout import THIN
from huarizo.model.frozen.linear import FrozenLinear, LowRank, traced_as_one
from huarizo.wording import first_line

FLOAT_CHANNELS = 8
BLOCK = 32  # channels that are rotated together
ROWS_AT_ONCE = 8 * BLOCK  # of a weight while it is quantised
EXACT_DEPTH = 1024  # number of int8 products whose sum is exact in fp32
SMALLEST = 1e-12  # scale of a row of zeros

# Shapes: T tokens, K input and N output channels, k float channels; K' and N' are K and N padded to whole blocks.


def quantise_rows(x_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 with one scale per row: float32 [T, K] -> int8 [T, K], float32 [T, 1]."""
    scale = x_TK.abs().amax(-1, keepdim=True).clamp_min(SMALLEST) * (1 / 127)
    return torch.round(x_TK * (1 / scale)).to(torch.int8), scale


def quantise_gradient(grad_TN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `quantise_rows`, but rounded stochastically, so that the rounding errors have mean zero."""
    scale = grad_TN.abs().amax(-1, keepdim=True).clamp_min(SMALLEST) * (1 / 127)
    steps = torch.floor(grad_TN * (1 / scale) + _noise(grad_TN, scale))
    return steps.clamp(-128, 127).to(torch.int8), scale


def _noise(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Numbers spread evenly over [0, 1), float32 [T, N], for rows [T, N] with these scales, float32 [T, 1].

    Channel n has the fraction of start + n / golden ratio (a Weyl sequence), in units of 2^-32. The start is a hash of
    the upper bits of the scale and of the sum of n^4 over the channels above zero. Both hardly ever depend on the order
    in which the entries' own sums were computed.
    """
    n = torch.arange(rows.shape[1], device=rows.device)
    signs = ((rows > 0) * (n**4 & 0xFFFFFFFF)).sum(-1, keepdim=True) & 0xFFFFFFFF
    start = (scale.contiguous().view(torch.int32).long() >> 8) * 0x85EBCA6B + signs * 0x27D4EB2F
    return ((start + n * 0x9E3779B9 & 0xFFFFFFFF) >> 9) * 2.0**-23


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Blocks of the last dimension times the Hadamard matrix of order BLOCK, float [..., K] -> [..., K'].

    Applied twice, it multiplies by BLOCK. Entry i, j of the matrix is -1 to the power of the number of 1 bits that i
    and j share.
    """
    index = torch.arange(BLOCK, device=x.device)
    shared = index[:, None] & index
    for shift in (4, 2, 1):
        shared = shared ^ (shared >> shift)
    hadamard = (1 - 2 * (shared & 1)).to(x.dtype)
    if x.shape[-1] % BLOCK:
        x = F.pad(x, (0, -x.shape[-1] % BLOCK))
    return (x.unflatten(-1, (-1, BLOCK)) @ hadamard).flatten(-2)


def int8_product(a_MK: torch.Tensor, b_KN: torch.Tensor) -> torch.Tensor:
    """int8 [M, K] times int8 [K, N], exact in int32 [M, N]; either may be a transposed view.

    On a CPU without int8 instructions that torch uses (x86 without VNNI or AMX, ARM) its int8 product is hundreds of
    times slower than fp32's. There the depth is split into parts whose sums fp32 holds exactly (EXACT_DEPTH 128^2 is
    2^24); they are multiplied in fp32 and added as integers. cuBLASLt requires more than 16 rows, K and N in multiples
    of 8, and b in column-major order. Fewer rows are padded with zeros, and another b is copied, which costs little
    beside the product.
    """
    rows = a_MK.shape[0]
    if a_MK.device.type == "cpu" and not torch_int8():
        parts = zip(a_MK.split(EXACT_DEPTH, 1), b_KN.split(EXACT_DEPTH, 0), strict=True)
        return sum((a.float() @ b.float()).int() for a, b in parts)  # pyright: ignore
    if a_MK.device.type == "cuda":
        b_KN = b_KN if b_KN.stride(0) == 1 else b_KN.t().contiguous().t()
        a_MK = F.pad(a_MK, (0, 0, 0, 17 - rows)) if rows <= 16 else a_MK.contiguous()
        return torch.ops.aten._int_mm(a_MK, b_KN)[:rows]
    return torch.ops.aten._int_mm(a_MK, b_KN)


def reason_against(on: torch.device, dtype: torch.dtype) -> str | None:
    """Why a device can't compute int8 products beside activations of this dtype, or not fast; None if it can."""
    if on.type == "cpu":
        return None if torch_int8() else kernel.reason_against(dtype)
    if on.type != "cuda":
        return f"int8 needs a CPU or an NVIDIA GPU, not {on.type}"
    try:
        int8_product(*(torch.ones(32, 32, dtype=torch.int8, device=on) for _ in range(2)))
    except (RuntimeError, NotImplementedError) as error:
        return first_line(error)
    return None


class Int8Weight(NamedTuple):
    """The operands of an `Int8Linear`'s products. If kernels/int8.c can be used, both weights are packed for it.

    A packed int8 weight is uint8.
    """

    weight: torch.Tensor
    """int8 [N', K'], smoothed and rotated."""
    scale: torch.Tensor
    """float32 [N']."""
    input_scale: torch.Tensor
    """float32 [K]: inverse_smoothing, with zeros at the float channels."""
    inverse_smoothing: torch.Tensor
    """float32 [K], 1 / s_j."""
    float_channels: torch.Tensor
    """int64 [k], ascending."""
    float_weight: torch.Tensor
    """[N, k] in the activations' dtype."""
    bias: torch.Tensor | None
    """[N]."""
    outputs: int
    """N."""


class _Int8Product(torch.autograd.Function):
    """y = x W' + b + h up', with gradients for x, h and up, by the kernels in C or for GPUs where they are."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, h: torch.Tensor | None, up: torch.Tensor | None, *parts: Any
    ) -> torch.Tensor:
        w = Int8Weight(*parts)
        ctx.save_for_backward(w.weight, w.scale, w.inverse_smoothing, h, up)
        if is_packed(w.weight):
            rows, of_layer = kernel.quantise(x, w.input_scale), (w.float_channels, w.float_weight, w.bias, w.outputs)
            return kernel.forward(*rows, w.weight, w.scale, x, *of_layer, h, up)
        if int8_gpu.reason_against(x.device, x.dtype) is None:
            rows, of_layer = int8_gpu.quantise(x, w.input_scale), (w.float_channels, w.float_weight, w.bias, w.outputs)
            return int8_gpu.forward(*rows, w.weight, w.scale, x, *of_layer, h, up)
        x_int8, x_scale = quantise_rows(rotated(x.float() * w.input_scale))
        y = rotated(int8_product(x_int8, w.weight.t()).float() * x_scale * w.scale)[:, : w.outputs]
        y = y + F.linear(x[:, w.float_channels], w.float_weight, w.bias).float()
        if h is not None and up is not None:
            y = y + LowRank(h, up).product().float()
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *of_layer, h, up = ctx.saved_tensors
        grad_h = grad_up = None
        if h is not None and any(ctx.needs_input_grad[1:3]):
            in_c = is_packed(of_layer[0]) and up.shape[1] <= THIN and thin.reason_against(h.dtype) is None
            gradients = up_backward if in_c else _up_backward_in_torch
            grad_h, grad_up = gradients(grads[0], h, up)
        grad_x = input_gradient(grads[0], *of_layer) if ctx.needs_input_grad[0] else None
        return grad_x, grad_h, grad_up, *(None for _ in Int8Weight._fields)


@operation("up_backward")
def up_backward(grad: torch.Tensor, h: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of h [T, r] and up [N, r] from that of h up', [T, N]."""
    return thin.up_backward(grad, h, up)


@torch.library.register_fake("huarizo::up_backward")
def _(grad: torch.Tensor, h: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(h, memory_format=torch.contiguous_format), up.new_empty(up.shape[::-1]).t()


def _up_backward_in_torch(grad: torch.Tensor, h: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `up_backward`."""
    return grad @ up.to(grad.dtype), (grad.t() @ h).float()


def input_gradient(
    grad: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, inverse_smoothing: torch.Tensor
) -> torch.Tensor:
    """The gradient of the input, [T, K], from that of the output, [T, N]; the other tensors are of an `Int8Weight`."""
    if is_packed(weight):
        return kernel.backward(grad, weight, scale, inverse_smoothing)
    if int8_gpu.reason_against(grad.device, grad.dtype) is None:
        return int8_gpu.backward(grad, weight, scale, inverse_smoothing)
    grad_int8, grad_scale = quantise_gradient(rotated(grad.float()) * scale)
    grad_x = rotated(int8_product(grad_int8, weight).float() * grad_scale)[:, : len(inverse_smoothing)]
    return (grad_x * inverse_smoothing).to(grad.dtype)


@traced_as_one
def int8_linear(x_TK: torch.Tensor, h: torch.Tensor | None, up: torch.Tensor | None, *weight: Any) -> torch.Tensor:
    """[T, K] -> [T, N] in the dtype of x, differentiable in x and h up', a LoRA's term. weight: of an `Int8Weight`."""
    return _Int8Product.apply(x_TK, h, up, *weight)  # pyright: ignore[reportReturnType]


def is_packed(weight: torch.Tensor) -> bool:
    """Whether a weight has the layout of kernels/int8.c."""
    return weight.dtype == torch.uint8


class Int8Linear(FrozenLinear):
    """x W' + b with a frozen int8 weight; its buffers are those of an `Int8Weight`."""

    storage = "int8"
    scale: torch.Tensor
    input_scale: torch.Tensor
    inverse_smoothing: torch.Tensor
    float_channels: torch.Tensor
    float_weight: torch.Tensor

    def __init__(
        self,
        linear: nn.Linear,
        input_scale: torch.Tensor,
        inverse_smoothing: torch.Tensor,
        float_channels: torch.Tensor,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.dtype = linear.weight.dtype
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("inverse_smoothing", inverse_smoothing)
        self.register_buffer("float_channels", float_channels)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        for name in ("weight", "scale", "float_weight"):
            self.register_buffer(name, None)
        self.store(linear.weight.detach())

    def store(self, weight: torch.Tensor) -> None:
        """Quantise a weight, float [N, K], with the layer's smoothing and float channels."""
        pack = weight.device.type == "cpu" and kernel.reason_against(self.dtype) is None
        int8_gpu.reason_against(weight.device, self.dtype)  # asked here first: it can't be while a compiler traces
        quantised, scales = [], []
        for rows in weight.split(ROWS_AT_ONCE):
            smoothed = rows.float() / self.inverse_smoothing
            part, scale = quantise_rows(rotated(rotated(smoothed).t()).t() / BLOCK**2)
            quantised.append(kernel.packed(part) if pack else part)
            scales.append(scale[:, 0])
        self.weight, self.scale = torch.cat(quantised), torch.cat(scales)
        float_weight = weight[:, self.float_channels].to(self.dtype).contiguous()
        self.float_weight = kernel.packed(float_weight) if pack else float_weight

    def plain(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The int8 and the float weight, unpacked: int8 [N', K'], float [N, k]."""
        if not is_packed(self.weight):
            return self.weight, self.float_weight
        floats = kernel.unpacked(self.float_weight, self.out_features, len(self.float_channels))
        return kernel.unpacked(self.weight), floats

    def dequantised(self) -> torch.Tensor:
        """The weight as it acts: float32 [N, K]."""
        weight, float_weight = self.plain()
        weight = rotated(rotated(weight.float() * self.scale[:, None]).t()).t()[: self.out_features, : self.in_features]
        return (weight * self.inverse_smoothing).index_copy(1, self.float_channels, float_weight.float())

    def forward(self, x: torch.Tensor, low_rank: LowRank | None = None) -> torch.Tensor:
        """[..., K] -> [..., N] in the dtype of x, with the term of a LoRA added."""
        h, up = (None, None) if low_rank is None else (low_rank.h.flatten(0, -2), low_rank.up)
        y = int8_linear(
            x.flatten(0, -2), h, up, self.weight, self.scale, self.input_scale, self.inverse_smoothing,
            self.float_channels, self.float_weight, self.bias, self.out_features,
        )  # fmt: skip
        return y.view(*x.shape[:-1], self.out_features)

    def input_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """[T, N] -> [T, K]."""
        return input_gradient(grad, self.weight, self.scale, self.inverse_smoothing)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, float_channels={len(self.float_channels)}"


def reference(x: torch.Tensor, layer: Int8Linear) -> torch.Tensor:
    """Reference implementation: the same rounding in float64, with exact products.

    x: [T, K]; returns float64 [T, N].
    """
    weight, float_weight = layer.plain()
    scaled = rotated(x.double() * layer.input_scale)
    step = scaled.abs().amax(-1, keepdim=True).clamp_min(SMALLEST) / 127
    y = torch.round(scaled / step) * step @ (weight.double() * layer.scale[:, None]).t()
    y = rotated(y)[:, : layer.out_features] + x.double()[:, layer.float_channels] @ float_weight.double().t()
    return y if layer.bias is None else y + layer.bias.double()


def reference_gradient(grad: torch.Tensor, layer: Int8Linear) -> torch.Tensor:
    """Reference implementation of the input gradient. grad: [T, N]; returns float64 [T, K]."""
    scaled = rotated(grad.double()) * layer.scale
    step = scaled.abs().amax(-1, keepdim=True).clamp_min(SMALLEST) / 127
    rounded = torch.floor(scaled / step + _noise(scaled, step.float())) * step
    grad_x = rounded @ layer.plain()[0].double()
    return rotated(grad_x)[:, : layer.in_features] * layer.inverse_smoothing


def quantise(linears: Sequence[nn.Linear], peaks: torch.Tensor) -> list[Int8Linear]:
    """Int8 layers for linears that share one input, so that they share its quantised form as well.

    peaks: float32 [K], the largest |x_j| seen of each input channel. The layers hold the same tensor objects for
    smoothing and float channels, so that a compiler sees that the quantised input is one value and computes it once.
    """
    weights = torch.stack([linear.weight.detach().abs().amax(0).float() for linear in linears]).amax(0).clamp_min(1e-5)
    smoothing = (peaks.clamp_min(1e-5) / weights).sqrt()
    count = min(FLOAT_CHANNELS, len(peaks) // 4)
    float_channels = (peaks / smoothing).topk(count).indices.sort().values
    # In the float channels the int8 weight serves the backward product only: it is scaled to the size of the others.
    typical = (weights * smoothing).median()
    smoothing = smoothing.index_copy(0, float_channels, typical / weights[float_channels])
    inverse_smoothing = 1 / smoothing
    input_scale = inverse_smoothing.index_fill(0, float_channels, 0)
    return [Int8Linear(linear, input_scale, inverse_smoothing, float_channels) for linear in linears]
