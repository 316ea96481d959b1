"""Every type of model that can be written as GGUF is the same one in llama.cpp."""

from pathlib import Path
from typing import Any

import pytest

from huarizo.results.gguf import export_adapter, export_gguf
from huarizo.results.verify import compare_adapter, compare_with_transformers
from tests.results.make import make_tuned

MIXED: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
GEMMA3: dict[str, Any] = {"head_dim": 32, "query_pre_attn_scalar": 32, **MIXED}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 16}
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
    "olmo3 yarn": MIXED
    | {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"attention_factor": 1.2079441541679836} | YARN,
        }
    },
    "phi3": {}, "qwen2": {}, "qwen2 tied": {"tie_word_embeddings": True}, "qwen3": {"head_dim": 32},
    "qwen3 yarn": {"head_dim": 32, "rope_parameters": YARN},
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


@pytest.mark.parametrize("name", ["gemma3_text", "glm4", "gpt2", "gpt_neox", "granite", "phi3", "qwen2"])
def test_an_adapter_alone_is_the_tuned_model_on_its_base(tmp_path: Path, name: str) -> None:
    tuned = make_tuned(tmp_path, model_type=name, targets="all-linear", **MODELS[name])
    found = compare_adapter(tuned, export_adapter(tuned, tmp_path / "adapter.gguf"))
    assert found.agrees("f16") and found.compared >= 4, found
