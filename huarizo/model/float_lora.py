"""LoRA on an nn.Linear in a 16-bit float, computed in the dtype of the activations; registered with PEFT.

PEFT casts the activations to the fp32 of A and B, and the sum back: on a GPU that takes several times as long as the
LoRA itself. Here A and B stay fp32 and are cast instead, as under autocast. Everything else is PEFT's own.
Seen with peft 0.19 to 0.21; tests/model/test_float_lora.py fails when the layer changes.
"""

import dataclasses
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from torch import nn

from huarizo.model.frozen.linear import FrozenLinear
from huarizo.model.frozen.lora import FrozenLoraLinear, low_rank_of


class FloatLoraLinear(Linear):
    """PEFT's LoRA on an nn.Linear: W x + b + scaling B A dropout(x), differentiable in x, A and B."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        if config.fan_in_fan_out:  # of the model's other layers; an nn.Linear's weight is [out, in]
            config = dataclasses.replace(config, fan_in_fan_out=False)
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[..., K] -> [..., N] in the dtype of x."""
        if x.dtype == torch.float32 or args or kwargs or self.disable_adapters or self.merged or self.lora_variant:
            return super().forward(x, *args, **kwargs)
        low_rank, result = low_rank_of(self, x), self.base_layer(x)
        return result if low_rank is None else result + low_rank.product()


def register(config: LoraConfig) -> LoraConfig:
    """Register Huarizo's layers with PEFT. The registration is not saved with the adapter."""
    config._register_custom_module({FrozenLinear: FrozenLoraLinear, nn.Linear: FloatLoraLinear})
    return config
