"""Tiny models of architectures that Huarizo knows nothing special of, for tests of the general path."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, OPTConfig, OPTForCausalLM

from huarizo.model.architectures import registry
from huarizo.model.architectures.llama import LLAMA
from tests.tiny import SPECIALS

SIZES: dict[str, Any] = {"vocab_size": len(SPECIALS) + 256, "hidden_size": 32, "num_hidden_layers": 2}

ONE_LAYER: dict[str, Any] = SIZES | {"num_hidden_layers": 1}


@dataclass(frozen=True)
class General:
    """How to make a model, the names of its parts, and linear layers that PEFT adds a LoRA to."""

    make: Callable[[], Any]
    parts: dict[str, str]
    targets: list[str]

    def save(self, folder: Path, tokenizer: Any) -> Path:
        """Write a model folder with random weights."""
        torch.manual_seed(0)
        self.make().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    def register(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let the model be trained within a test."""
        known = {self.parts["model_type"]: dataclasses.replace(
            LLAMA, **self.parts, packs=False, gguf=None, sizes=("hidden_size", "num_hidden_layers", "vocab_size"),
            layer_weights=lambda config: 4 * config["hidden_size"] ** 2,
            layer_activation_bytes=lambda config, size: 64 * config["hidden_size"] * size,
        )}  # fmt: skip
        monkeypatch.setattr(registry, "ARCHITECTURES", registry.ARCHITECTURES | known)


GENERAL = {
    "opt": General(
        lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=48, num_attention_heads=4, word_embed_proj_dim=32)),
        {"model_type": "opt", "embedding": "model.decoder.embed_tokens", "layers": "model.decoder.layers"},
        ["q_proj", "v_proj", "fc1"],
    ),
    "mamba": General(
        lambda: MambaForCausalLM(MambaConfig(**ONE_LAYER, state_size=4)),
        {"model_type": "mamba", "embedding": "backbone.embeddings", "layers": "backbone.layers"},
        ["in_proj", "x_proj"],
    ),
}
