"""Tiny models of architectures that Huarizo knows nothing special of, for tests of the general path."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import MambaConfig, MambaForCausalLM, OPTConfig, OPTForCausalLM

from tests.tiny import SPECIALS

SIZES: dict[str, Any] = {"vocab_size": len(SPECIALS) + 256, "hidden_size": 32, "num_hidden_layers": 2}

ONE_LAYER: dict[str, Any] = SIZES | {"num_hidden_layers": 1}


@dataclass(frozen=True)
class General:
    """How to make a model, and linear layers that PEFT adds a LoRA to."""

    make: Callable[[], Any]
    targets: list[str]

    def save(self, folder: Path, tokenizer: Any) -> Path:
        """Write a model folder with random weights."""
        torch.manual_seed(0)
        self.make().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder


GENERAL = {
    "opt": General(
        lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=48, num_attention_heads=4, word_embed_proj_dim=32)),
        ["q_proj", "v_proj", "fc1"],
    ),
    "mamba": General(
        lambda: MambaForCausalLM(MambaConfig(**ONE_LAYER, state_size=4)),
        ["in_proj", "x_proj"],
    ),
}
