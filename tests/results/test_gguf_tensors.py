"""Every type of model that can be written as GGUF is the same one in llama.cpp."""

from pathlib import Path
from typing import Any

import pytest

from huarizo.results.gguf import export_gguf
from huarizo.results.verify import compare_with_transformers
from tests.results.make import make_tuned

MIXED: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
GEMMA3: dict[str, Any] = {"head_dim": 32, "query_pre_attn_scalar": 32, **MIXED}
MODELS: dict[str, dict[str, Any]] = {
    "gemma3_text": GEMMA3,
    "gemma3_text bases": GEMMA3
    | {
        "final_logit_softcapping": 3.0,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
        },
    },
    "gemma3_text untied": GEMMA3 | {"tie_word_embeddings": False},
    "cohere": {"logit_scale": 0.5},
    "cohere 64": {"logit_scale": 0.5, "use_qk_norm": True, "num_hidden_layers": 64, "hidden_size": 32},
    "cohere2": {"logit_scale": 0.5, "head_dim": 16, **MIXED},
    "gemma": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 2.0,
               "final_logit_softcapping": 3.0, **MIXED},
    "glm4": {"head_dim": 16, "attention_bias": True},
    "glm4 plain": {"head_dim": 16, "attention_bias": False},
    "gpt2": {"n_inner": None},
    "gpt2 untied": {"n_inner": 96, "tie_word_embeddings": False},
    "gpt_neox": {"rotary_pct": 0.5}, "gpt_neox serial": {"use_parallel_residual": False},
    "gpt_neox tied": {"tie_word_embeddings": True},
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 4.0, "residual_multiplier": 0.5,
                "attention_multiplier": 0.3, "attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": None, "head_dim": 32},
    "olmo2": {}, "olmo2 tied": {"tie_word_embeddings": True},
    "olmo3": MIXED,
    "phi3": {}, "qwen2": {}, "qwen2 tied": {"tie_word_embeddings": True}, "qwen3": {"head_dim": 32},
    "smollm3": {"num_hidden_layers": 4},
    "stablelm": {}, "stablelm parallel": {"use_parallel_residual": True, "use_qkv_bias": True},
}  # fmt: skip
"""Small models; the first word is the model_type. Every prompt is longer than a window of 8."""


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same(tmp_path: Path, name: str) -> None:
    tuned = make_tuned(tmp_path, model_type=name.split()[0], targets="all-linear", **MODELS[name])
    found = compare_with_transformers(tuned, export_gguf(tuned, tmp_path / "model.gguf", "f32"))
    assert found.agrees("f32") and found.compared >= 4
    assert found.largest_difference < 0.01, found
