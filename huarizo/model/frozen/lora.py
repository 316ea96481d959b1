"""LoRA on a FrozenLinear, for PEFT's hook for custom modules.

    y = W_stored x + scaling B A dropout(x)

A [r, K] and B [N, r] are stored in fp32 and multiplied in the dtype of the activations, as under autocast. They see the
float activations, not quantised ones, so the adapter fits the float model. It is saved as an ordinary PEFT adapter.
Seen with peft 0.19 to 0.21; tests/model/frozen/test_lora.py fails when the hook moves.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from huarizo.model.dropout import HashedDropout
from huarizo.model.frozen.linear import FrozenLinear, LowRank

NEEDS_NO_WEIGHT = ("gaussian", "eva")  # initialisations that do not read the base weight


class FrozenLoraLinear(nn.Module, LoraLayer):
    """A FrozenLinear with adapters, created by PEFT.

    Raises:
        ValueError: LoRA variants that change more than adding B A x (DoRA and others), or a LoRA bias.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: object,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.fan_in_fan_out = False
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: object) -> None:
        if config.lora_bias:
            raise ValueError(f"lora_bias is not supported with precision {self._storage}. Use precision=bf16 or fp32")
        try:
            super().resolve_lora_variant(config=config)
        except ValueError:
            raise ValueError(
                "this LoRA variant (DoRA, or another that changes more than adding B A x) is not supported with "
                f"precision {self._storage}. Use precision=bf16 or fp32"
            ) from None

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:  # pyright: ignore
        init = config.init_lora_weights
        if isinstance(init, str) and init not in NEEDS_NO_WEIGHT:
            with _float_weight(cast(FrozenLinear, self.get_base_layer())):
                super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)
        else:
            super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """[..., K] -> [..., N] in the dtype of x."""
        return self.base_layer(x, None if self.disable_adapters else low_rank_of(self, x))

    def merge(self, *args: object, **kwargs: object) -> None:
        raise ValueError(
            f"an adapter can't be merged into {self._storage} weights. Load the float base and merge it there"
        )

    def unmerge(self) -> None:
        raise ValueError(f"nothing was merged: an adapter can't be merged into {self._storage} weights")

    @property
    def _storage(self) -> str:
        return cast(FrozenLinear, self.get_base_layer()).storage


@contextmanager
def _float_weight(base: FrozenLinear) -> Iterator[None]:
    """Inside the block the weight is float32, for initialisations that read and change it (PiSSA, OLoRA)."""
    quantised, shown = base.weight, base.dequantised()
    before = shown.clone()
    base.weight = shown
    try:
        yield
    finally:
        changed, base.weight = base.weight.detach(), quantised
    if not torch.equal(changed, before):
        base.store(changed)


def low_rank_of(layer: LoraLayer, x: torch.Tensor) -> LowRank | None:
    """The sum of the terms of a layer's active adapters, as one term whose rank is the sum of theirs. x: [..., K]."""
    assert isinstance(layer, nn.Module)
    terms = [_term(layer, name, x) for name in layer.active_adapters if name in layer.lora_A]
    if len(terms) <= 1:
        return terms[0] if terms else None
    return LowRank(*(torch.cat(parts, -1) for parts in zip(*terms, strict=True)))


def _term(layer: LoraLayer, name: str, x: torch.Tensor) -> LowRank:
    a, b = (cast(nn.Linear, linears[name]).weight for linears in (layer.lora_A, layer.lora_B))
    dropout = layer.lora_dropout[name]
    fused = isinstance(dropout, HashedDropout)
    h = dropout.linear(x, a) if fused else F.linear(dropout(x), a.to(x.dtype))
    return LowRank(h, b.float() * layer.scaling[name])
