"""What a configuration asks of llama.cpp and llama.cpp does not compute is refused by the name of the field."""

from pathlib import Path
from typing import Any

import gguf
import pytest
from transformers import CONFIG_MAPPING

from huarizo.errors import ModelError
from huarizo.model.architectures.registry import ARCHITECTURES
from huarizo.results.gguf_settings import Settings

S, F = "sliding_attention", "full_attention"


def settings(model_type: str, **config: Any) -> Settings:
    layout = ARCHITECTURES[model_type].gguf
    assert layout is not None
    return Settings(layout, CONFIG_MAPPING[model_type](**config), Path("base"))


def yarn(**values: Any) -> dict[str, Any]:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    return {"rope_parameters": rope | values}


def local(**values: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    return {"rope_parameters": {S: rope | values, F: rope}}


@pytest.mark.parametrize(
    ("model_type", "config", "message"),
    [
        ("gemma2", {"query_pre_attn_scalar": 224}, "query_pre_attn_scalar is 224, and llama.cpp computes with 256"),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping is None"),
        ("gemma2", {"layer_types": [F, S] * 13}, "layer_types"),
        ("gemma2", {"num_hidden_layers": 46, "head_dim": 128, "hidden_size": 4608, "num_attention_heads": 32,
                    "query_pre_attn_scalar": 128}, "query_pre_attn_scalar is 128, and llama.cpp computes with 144"),
        ("gemma3_text", {"query_pre_attn_scalar": 168}, "query_pre_attn_scalar"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"layer_types": [S, S, F, S] * 5, "num_hidden_layers": 20}, "layer_types"),
        ("gemma3_text", local(rope_type="linear", factor=2.0), "rope_parameters.sliding_attention.rope_type"),
        ("gemma", {"hidden_act": "silu"}, "the activation gelu_pytorch_tanh, not silu"),
        ("olmo3", local(rope_theta=5e3), "rope_parameters.sliding_attention.rope_theta"),
        ("olmo2", {"attention_bias": True}, "attention_bias"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm"),
        ("cohere2", {"sliding_window": None}, "sliding_window is missing"),
        ("smollm3", {"num_hidden_layers": 2, "no_rope_layers": [1, 0]}, "no_rope_layers"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm"),
        ("gpt_neox", {"attention_bias": False}, "attention_bias"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"activation_function": "relu"}, "not relu"),
        ("qwen3", yarn(attention_factor=1.5), "rope_parameters.attention_factor is 1.5"),
        ("qwen3", yarn(beta_fast=16), "rope_parameters.beta_fast is 16"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48,
                                      "long_factor": [1.0] * 48}}, "rope scaling 'longrope'"),
    ],
)  # fmt: skip
def test_the_field_is_named(model_type: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        settings(model_type, **config)


@pytest.mark.parametrize(
    ("model_type", "config"),
    [("gemma2", {"query_pre_attn_scalar": 256}), ("gemma3_text", {}), ("olmo3", {}), ("cohere2", {}), ("smollm3", {}),
     ("cohere", {"use_qk_norm": True, "num_hidden_layers": 64}), ("qwen3", yarn(attention_factor=1.138629436))],
)  # fmt: skip
def test_what_llama_cpp_computes_is_not_refused(model_type: str, config: dict[str, Any]) -> None:
    settings(model_type, **config)


@pytest.mark.parametrize(
    ("model_type", "config", "longest"),
    [
        ("mistral", {"sliding_window": 64, "max_position_embeddings": 512}, 64),
        ("mistral", {"sliding_window": None, "max_position_embeddings": 512}, 512),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, 64),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 64, "max_position_embeddings": 512}, 512),
        ("phi3", {"sliding_window": 64, "max_position_embeddings": 512}, 64),
        ("gemma3_text", {"sliding_window": 64, "max_position_embeddings": 512}, 512),
    ],
)
def test_a_window_that_llama_cpp_lacks_never_cuts_a_text(
    tmp_path: Path, model_type: str, config: dict[str, Any], longest: int
) -> None:
    found = settings(model_type, **config)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", found.layout.name)
    found.write(writer)
    assert writer.kv_data[0][f"{found.layout.name}.context_length"].value == longest
