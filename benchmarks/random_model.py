"""A model folder of TinyLlama-1.1B's shape with random weights, for timing where the real weights can't be had.

    python benchmarks/random_model.py TARGET_FOLDER TOKENIZER_FOLDER

Speed and memory hang on shapes and dtypes, not on what the weights say. Made once and kept; the tokenizer is copied
from the folder that is given.
"""

import shutil
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from huarizo.files import whole_folder

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


def tinyllama_shape() -> LlamaConfig:
    """The figures of TinyLlama-1.1B's config.json."""
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        initializer_range=0.02,
        bos_token_id=1,
        eos_token_id=2,
    )


def make(target: Path, tokenizer: Path) -> None:
    """Write the folder; it appears whole or not at all."""
    files = sorted({file for pattern in TOKENIZER_FILES for file in tokenizer.glob(pattern)})
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(target) as folder:
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = LlamaForCausalLM(tinyllama_shape())
        model.save_pretrained(folder)
        for file in files:
            shutil.copy(file, folder)


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]))
