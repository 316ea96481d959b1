"""Dropout whose mask is a hash of place and seed, for training on a CPU.

torch draws its masks number by number on a CPU, and at a rank of 8 that costs more than LoRA's own products. A hash is
integer arithmetic on whole vectors, and the backward pass makes the mask again instead of keeping it. It takes the
place of torch's dropout where there is a C kernel for it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from huarizo.kernels import dropout as kernel

MASK = 2**32 - 1
THIN = 32  # the largest rank whose product is made with the mask


def hashed(count: int, seed: torch.Tensor) -> torch.Tensor:
    """Uniform integers below 2^32, int64 [count], a pure function of place and seed (int64 [1]).

    Rounds of xor-shift and multiply modulo 2^32, the seed between them; dropout.c has the same.
    """
    x = torch.arange(count, device=seed.device)
    for multiplier in (0x21F0AAAD, 0x735A2D97, 0x21F0AAAD):
        x = (x ^ (x >> 16)) * multiplier & MASK
        x = (x ^ (x >> 15)) + seed & MASK
    return x


def reference(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """The definition of correct: x / (1 - p) where the hash is at least p 2^32, and 0 elsewhere."""
    keep = hashed(x.numel(), seed).view(x.shape) >= int(p * 2**32)
    scale = torch.tensor(1 / (1 - p), dtype=torch.float32)
    return torch.where(keep, (x.float() * scale).to(x.dtype), 0)


@torch.library.custom_op("huarizo::hashed_dropout", mutates_args=())
def _dropped(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """x: any shape, contiguous in the result; seed: int64 [1]."""
    return kernel.dropped(x, int(seed), int(p * 2**32), 1 / (1 - p))


@_dropped.register_fake
def _(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return _dropped(grad, *ctx.saved_tensors, ctx.p), None, None


_dropped.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("huarizo::dropped_linear", mutates_args=())
def _dropped_linear(x: torch.Tensor, weight: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """x: [T, K]; weight: float32 [r, K]; returns [T, r] in the dtype of x."""
    return kernel.down(x, weight, int(seed), int(p * 2**32), 1 / (1 - p))


@_dropped_linear.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("huarizo::dropped_linear_backward", mutates_args=())
def _dropped_linear_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, seed: torch.Tensor, p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return kernel.down_backward(grad, x, weight, int(seed), int(p * 2**32), 1 / (1 - p))


@_dropped_linear_backward.register_fake
def _(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, seed: torch.Tensor, p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.p = inputs
    ctx.save_for_backward(*tensors)


def _linear_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *_dropped_linear_backward(grad, *ctx.saved_tensors, ctx.p), None, None


_dropped_linear.register_autograd(_linear_backward, setup_context=_save_linear)


class HashedDropout(nn.Module):
    """Sets a share p of the values to zero and scales the rest by 1 / (1 - p), in training only."""

    seed: torch.Tensor

    def __init__(self, p: float, seed: torch.Tensor) -> None:
        super().__init__()
        self.p = p
        self.register_buffer("seed", seed, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _dropped(x, self.seed, self.p) if self.training else x

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """A linear layer behind the dropout, in the dtype of x.

        x: [..., K]; weight: float32 [r, K]; returns [..., r]. With a small r what passes the dropout never stands in
        memory; with a larger one torch's product of it is faster.
        """
        if not self.training or len(weight) > THIN:
            return F.linear(self(x), weight.to(x.dtype))
        return _dropped_linear(x.flatten(0, -2), weight, self.seed, self.p).view(*x.shape[:-1], -1)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def hash_dropouts(model: nn.Module, root: nn.Module) -> None:
    """Replace every nn.Dropout of `model` by a HashedDropout; each forward of `root` in training draws new seeds.

    The seeds come from torch's generator, so a run with the same seed, or gone on with, has the same masks. Without a
    kernel nothing is replaced.
    """
    if kernel.reason_against() is not None:
        return
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Dropout) and child.p > 0
    ]
    seeds = torch.zeros(len(places), dtype=torch.int64)
    for number, (parent, name, child) in enumerate(places):
        setattr(parent, name, HashedDropout(child.p, seeds[number : number + 1]).train(child.training))

    def draw(module: nn.Module, args: tuple[Any, ...]) -> None:
        if module.training:
            seeds.random_(2**32)

    if places:
        root.register_forward_pre_hook(draw)
