"""Dropout whose mask is a hash of position and seed, for compiled layers on a CPU.

torch draws its masks number by number on a CPU, compiled or not, and at a rank of 8 that costs more than LoRA's own
products. A hash is integer arithmetic on whole vectors, is fused with what surrounds it, and is made again in the
backward pass instead of being kept: 20 times faster at 773 tokens of TinyLlama's hidden size. Not compiled it is slower
than torch's, so `huarizo.model.fast` puts it in place only where it compiles.
"""

from typing import Any

import torch
from torch import nn

MASK = 2**32 - 1


def hashed(count: int, seed: torch.Tensor) -> torch.Tensor:
    """Uniform integers below 2^32, int64 [count], a pure function of position and seed (int64 [1]).

    Rounds of xor-shift and multiply modulo 2^32 (constants from C. Wellons' hash prospector), the seed between them.
    """
    x = torch.arange(count, device=seed.device)
    for multiplier in (0x21F0AAAD, 0x735A2D97, 0x21F0AAAD):
        x = (x ^ (x >> 16)) * multiplier & MASK
        x = (x ^ (x >> 15)) + seed & MASK
    return x


class HashedDropout(nn.Module):
    """Sets a share p of the values to zero and scales the rest by 1 / (1 - p), in training only."""

    seed: torch.Tensor

    def __init__(self, p: float, seed: torch.Tensor) -> None:
        super().__init__()
        self.p = p
        self.register_buffer("seed", seed, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        keep = hashed(x.numel(), self.seed).view(x.shape) >= int(self.p * 2**32)
        return torch.where(keep, x * (1 / (1 - self.p)), 0)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def hash_dropouts(model: nn.Module, root: nn.Module) -> None:
    """Replace every nn.Dropout of `model` by a HashedDropout; each forward of `root` in training draws new seeds.

    The seeds come from torch's generator, so a run with the same seed, or gone on with, has the same masks.
    """
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
