"""The Llama architecture, and what llama.cpp needs to know of it."""

from huarizo.model.architectures.architecture import Architecture, GgufLayout

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The pattern of Llama 3's pre-tokenizer."""

LLAMA = Architecture(
    model_type="llama",
    packs=True,
    gguf=GgufLayout(
        name="llama",
        activation="silu",
        interleaved={"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"},
        splits={LLAMA3_SPLIT: "llama-bpe"},
    ),
)
