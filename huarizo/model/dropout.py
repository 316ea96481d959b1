"""Dropout whose mask is a hash of seed, layer, step, token and channel: the same on every device.

A token is identified by its place in the optimizer step, not in the micro-batch. So the masks don't depend on how a
step is cut into micro-batches or spread over processes, on compilation or the kernel, or on whether a run was resumed.
On a CPU a hash in C is faster than torch's own generator. The backward pass recomputes the mask instead of storing it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import BackwardCFunction, FunctionCtx

from huarizo.kernels import dropout as kernel
from huarizo.kernels.operations import operation

THIN = 32  # the largest rank whose product is fused with the mask
CAPACITY = 4096  # initial size of the buffer of places, in tokens of a micro-batch
SIGN = -(2**31)

# Shapes: T tokens, K channels, r the rank.


def hashed(index: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    """Uniform 32 bits, int32 in the shape of `index` (int32), a pure function of it and the seed (int32 [1]).

    Rounds of xor-shift and multiply modulo 2^32, with the seed added after each; dropout.c computes the same.
    """
    x = index
    for multiplier in (0x21F0AAAD, 0x735A2D97, 0x21F0AAAD):
        x = (x ^ ((x >> 16) & 0xFFFF)) * multiplier
        x = (x ^ ((x >> 15) & 0x1FFFF)) + seed
    return x


def indices(places: torch.Tensor, channels: int) -> torch.Tensor:
    """The hash's input for each channel of the tokens at these places: place * channels + channel modulo 2^32.

    places: int32 [T]. Returns int32 [T, channels].
    """
    return places[:, None] * channels + torch.arange(channels, dtype=torch.int32, device=places.device)


def kept(places: torch.Tensor, channels: int, seed: torch.Tensor, p: float) -> torch.Tensor:
    """The channels to keep, where the hash is at least p 2^32. places: int32 [T]; returns bool [T, channels]."""
    return _kept(places, channels, seed, share(p, places.device)[0])


def _kept(places: torch.Tensor, channels: int, seed: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Flipping the sign bit of both sides makes signed integers compare as unsigned ones."""
    return (hashed(indices(places, channels), seed) ^ SIGN) >= threshold


def share(p: float, on: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Threshold and scale for a dropout share p: int32 [1], p 2^32 with its sign bit flipped; float32 [1], 1 / (1 - p).

    Tensors, because torch.compile (2.13), once it has seen two different numbers, computes with the third in fewer
    digits.
    """
    threshold = torch.tensor([int(p * 2**32) + SIGN], dtype=torch.int32, device=on)
    return threshold, torch.tensor([1 / (1 - p)], dtype=torch.float32, device=on)


def reference(x: torch.Tensor, places: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """Reference implementation: x [T, K] / (1 - p) where it is `kept`, and 0 elsewhere, in the dtype of x."""
    return _dropped_in_torch(x, places, seed, *share(p, x.device))


def _dropped_in_torch(
    x: torch.Tensor, places: torch.Tensor, seed: torch.Tensor, threshold: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    return torch.where(_kept(places, x.shape[1], seed, threshold), (x.float() * scale).to(x.dtype), 0)


# The operations below take places, int32 [T]; seed, int32 [1]; threshold and scale from `share`.


@operation("hashed_dropout")
def _dropped(
    x: torch.Tensor, places: torch.Tensor, seed: torch.Tensor, threshold: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """x: [T, K]; returns [T, K], contiguous."""
    return kernel.dropped(x, places, *_mask(seed, threshold, scale))


def _mask(seed: torch.Tensor, threshold: torch.Tensor, scale: torch.Tensor) -> tuple[int, int, float]:
    """Seed and threshold as unsigned integers, and the scale, as the kernel takes them."""
    return int(seed) & 0xFFFFFFFF, int(threshold) - SIGN, float(scale)


@torch.library.register_fake("huarizo::hashed_dropout")
def _(
    x: torch.Tensor, places: torch.Tensor, seed: torch.Tensor, threshold: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx: FunctionCtx, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: BackwardCFunction, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return _dropped(grad, *ctx.saved_tensors), None, None, None, None


torch.library.register_autograd("huarizo::hashed_dropout", _backward, setup_context=_save)


@operation("dropped_linear")
def _dropped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    places: torch.Tensor,
    seed: torch.Tensor,
    threshold: torch.Tensor,
    scale: torch.Tensor,
) -> torch.Tensor:
    """x: [T, K]; weight: float32 [r, K]; returns [T, r] in the dtype of x."""
    return kernel.down(x, weight, places, *_mask(seed, threshold, scale))


@torch.library.register_fake("huarizo::dropped_linear")
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    places: torch.Tensor,
    seed: torch.Tensor,
    threshold: torch.Tensor,
    scale: torch.Tensor,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@operation("dropped_linear_backward")
def _dropped_linear_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    places: torch.Tensor,
    seed: torch.Tensor,
    threshold: torch.Tensor,
    scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    return kernel.down_backward(grad, x, weight, places, *_mask(seed, threshold, scale))


@torch.library.register_fake("huarizo::dropped_linear_backward")
def _(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    places: torch.Tensor,
    seed: torch.Tensor,
    threshold: torch.Tensor,
    scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight)


def _save_linear(ctx: FunctionCtx, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _linear_backward(ctx: BackwardCFunction, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *_dropped_linear_backward(grad, *ctx.saved_tensors), None, None, None, None


torch.library.register_autograd("huarizo::dropped_linear", _linear_backward, setup_context=_save_linear)


class HashedDropout(nn.Module):
    """Sets a share p of the values to zero and scales the rest by 1 / (1 - p), in training only.

    seed: int32 [1]; places: int32, of at least the tokens of the next call. `DropoutMasks` sets both. They are not
    buffers, because they belong to the step, not to the model.
    """

    seed: torch.Tensor
    places: torch.Tensor

    def __init__(self, p: float, seed: torch.Tensor, places: torch.Tensor) -> None:
        super().__init__()
        self.p, self.seed, self.places = p, seed, places
        self.threshold, self.scale = share(p, seed.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., K]; all dimensions but the last are tokens."""
        if not self.training:
            return x
        x_TK = x.flatten(0, -2)
        drop = _dropped if _in_c(x) else _dropped_in_torch
        return drop(x_TK, *self._mask(x_TK)).view(x.shape)

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Dropout followed by a linear layer, in the dtype of x.

        x: [..., K]; weight: float32 [r, K]; returns [..., r]. With a kernel and a small r, the dropped x is never
        stored; with a larger r torch's product is faster.
        """
        if not self.training or len(weight) > THIN or not _in_c(x):
            return F.linear(self(x), weight.to(x.dtype))
        x_TK = x.flatten(0, -2)
        h_Tr = _dropped_linear(x_TK, weight, *self._mask(x_TK))
        return h_Tr.view(*x.shape[:-1], -1)

    def _mask(self, x_TK: torch.Tensor) -> list[torch.Tensor]:
        """Places, seed, threshold and scale on the device of x: a model may be spread over several GPUs."""
        mask = self.places[: x_TK.shape[0]], self.seed, self.threshold, self.scale
        return [tensor.to(x_TK.device) for tensor in mask]

    def extra_repr(self) -> str:
        return f"p={self.p}"


def _in_c(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and _has_kernel(x.dtype)


@torch.compiler.assume_constant_result
def _has_kernel(dtype: torch.dtype) -> bool:
    return kernel.reason_against(dtype) is None


class DropoutMasks:
    """The masks of a model's HashedDropouts, which replace every nn.Dropout with p > 0.

    seed: of the run; room: the largest expected number of tokens in a micro-batch.
    """

    def __init__(self, model: nn.Module, seed: int, room: int = CAPACITY) -> None:
        places = [
            (parent, name, child)
            for parent in model.modules()
            for name, child in parent.named_children()
            if isinstance(child, nn.Dropout) and child.p > 0
        ]
        on = next(model.parameters()).device
        self._seed = torch.tensor([seed % 2**32], device=on).int()
        self._seeds = torch.zeros(len(places), dtype=torch.int32, device=on)
        self._places = torch.arange(max(room, CAPACITY), dtype=torch.int32, device=on)
        self._dropouts: list[HashedDropout] = []
        for number, (parent, name, child) in enumerate(places):
            hashed_dropout = HashedDropout(child.p, self._seeds[number : number + 1], self._places)
            setattr(parent, name, hashed_dropout.train(child.training))
            self._dropouts.append(hashed_dropout)

    @torch.no_grad()
    def draw(self, step: int, places: torch.Tensor) -> None:
        """Draw the masks of a micro-batch. step: of the optimizer; places: of the tokens in the step, integers [T]."""
        if not self._dropouts:
            return
        if len(places) > len(self._places):
            self._places = self._places.new_empty(2 * len(places))
            for dropout in self._dropouts:
                dropout.places = self._places
        self._places[: len(places)] = places
        first, count = step * len(self._seeds), len(self._seeds)
        index = torch.arange(first, first + count, device=self._seeds.device).int()
        self._seeds.copy_(hashed(index, self._seed))


@contextmanager
def at_places(module: nn.Module, places: torch.Tensor) -> Iterator[None]:
    """Inside the block `module` sees the tokens at these places of the step. places: integers [T]."""
    dropouts = [child for child in module.modules() if isinstance(child, HashedDropout)]
    before = [dropout.places for dropout in dropouts]
    for dropout in dropouts:
        dropout.places = places.int()
    try:
        yield
    finally:
        for dropout, earlier in zip(dropouts, before, strict=True):
            dropout.places = earlier
