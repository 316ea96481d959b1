"""The Llama architecture: RMSNorm, rotary positions, grouped queries and a gated MLP, usually without biases.

Differences between its checkpoints (a tied head, rope scaling, attention bias) are left to Transformers.
"""

from collections.abc import Mapping
from typing import Any

from huarizo.model.architectures.architecture import Architecture, GgufLayout

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The pattern of Llama 3's pre-tokenizer."""


def layer_weights(config: Mapping[str, Any]) -> float:
    """q and o, k and v, and the three matrices of the MLP."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    shared = (config.get("num_key_value_heads") or heads) / heads
    return hidden * hidden * (2 + 2 * shared) + 3 * hidden * config["intermediate_size"]


def layer_activation_bytes(config: Mapping[str, Any], size: int) -> int:
    """The norms store their input and its fp32 copy (12 hidden sizes in all); attention stores q, k, v, the output and
    rope's products (8); the MLP stores gate, up, silu and their product (6 intermediate sizes); LoRA stores fp32 inputs
    (8 hidden sizes)."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    return 20 * hidden * size + 6 * inner * size + 8 * hidden * 4


LLAMA = Architecture(
    model_type="llama",
    described="the Llama architecture (model_type 'llama'): TinyLlama, Llama 2 and 3, SmolLM2, Vicuna and others",
    embedding="model.embed_tokens",
    layers="model.layers",
    norm="model.norm",
    rotary_embedding="model.rotary_emb",
    head="lm_head",
    shared_inputs=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    sizes=("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
    layer_weights=layer_weights,
    layer_activation_bytes=layer_activation_bytes,
    gguf=GgufLayout(
        name="llama",
        activation="silu",
        interleaved={"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"},
        splits={LLAMA3_SPLIT: "llama-bpe"},
    ),
)
