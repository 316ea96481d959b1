"""How llama.cpp represents each architecture that it knows, as data.

What stands here follows llama.cpp's own code for each (src/models/), and is tested in it
(tests/results/test_gguf_tensors.py).
"""

import dataclasses
from typing import Any

from huarizo.model.architectures.architecture import GgufLayout

RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
LAYER_NORM = {"attention.layer_norm_epsilon": "layer_norm_eps"}
GELU_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
"""Names of the approximation of GELU by tanh."""
HALVES = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
YARN = ("default", "linear", "yarn")


def _query_scale(config: Any, hidden_per_head_at: int) -> str | None:
    """llama.cpp takes the scale from the size of a head, or in Gemma's largest model from hidden size and heads."""
    largest = config.num_hidden_layers == hidden_per_head_at
    expected = config.hidden_size // config.num_attention_heads if largest else config.head_dim
    if config.query_pre_attn_scalar != expected:
        return f"query_pre_attn_scalar is {config.query_pre_attn_scalar:g}, and llama.cpp computes with {expected}"
    return None


def _gemma2(config: Any) -> str | None:
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if not getattr(config, name):
            return f"{name} is {getattr(config, name)}, and llama.cpp always caps"
    return _query_scale(config, 46)


def _gemma3(config: Any) -> str | None:
    return _query_scale(config, 62)


def _cohere(config: Any) -> str | None:
    if config.use_qk_norm != (config.num_hidden_layers >= 64):
        return f"use_qk_norm is {config.use_qk_norm}; in llama.cpp only models of 64 layers and more have these norms"
    return None


def _smollm3(config: Any) -> str | None:
    if any(bool(rope) != ((number + 1) % 4 != 0) for number, rope in enumerate(config.no_rope_layers)):
        return "no_rope_layers is not every fourth layer, as it is in llama.cpp"
    return None


LLAMA = GgufLayout(name="llama", numbers=RMS, ropes=("default", "linear", "llama3"), interleaved=HALVES)
SMOLLM3 = GgufLayout(name="smollm3", numbers=RMS, interleaved=HALVES, check=_smollm3)
GRANITE = GgufLayout(
    name="granite",
    numbers=RMS
    | {
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    },
    interleaved=HALVES,
)
QWEN2 = GgufLayout(name="qwen2", numbers=RMS, ropes=YARN)
QWEN3 = GgufLayout(name="qwen3", numbers=RMS, ropes=YARN, fixed={"attention_bias": (False,)})
OLMO2 = GgufLayout(name="olmo2", numbers=RMS, ropes=YARN, windows=True, head="own", fixed={"attention_bias": (False,)})
PHI3 = GgufLayout(name="phi3", numbers=RMS, ropes=("default",), partial_rope=True)
GEMMA = GgufLayout(
    name="gemma",
    numbers=RMS,
    fixed={"attention_bias": (False,), "use_bidirectional_attention": (None, False)},
    activations=GELU_TANH,
    head="shared",
    one_plus_norms=True,
)
GEMMA2 = dataclasses.replace(
    GEMMA,
    name="gemma2",
    numbers=RMS
    | {
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    check=_gemma2,
    windows=True,
)
GEMMA3 = dataclasses.replace(
    GEMMA,
    name="gemma3",
    numbers=RMS | {"final_logit_softcapping": "final_logit_softcapping"},
    fixed={**GEMMA.fixed, "attn_logit_softcapping": (None,)},
    check=_gemma3,
    local_theta=True,
    windows=True,
    head="either",
)
COHERE = GgufLayout(
    name="command-r",
    numbers=LAYER_NORM | {"logit_scale": "logit_scale"},
    check=_cohere,
    head="shared",
    fixed={"attention_bias": (False,)},
)
COHERE2 = GgufLayout(
    name="cohere2",
    numbers=LAYER_NORM | {"logit_scale": "logit_scale"},
    windows=True,
    head="shared",
    fixed={"attention_bias": (False,)},
)
GLM4 = GgufLayout(name="glm4", numbers=RMS, partial_rope=True)
STABLELM = GgufLayout(
    name="stablelm",
    numbers=LAYER_NORM | {"use_parallel_residual": "use_parallel_residual"},
    fixed={"qk_layernorm": (False,)},
    partial_rope=True,
    head="own",
)
GPT_NEOX = GgufLayout(
    name="gptneox",
    numbers=LAYER_NORM | {"use_parallel_residual": "use_parallel_residual"},
    fixed={"attention_bias": (True,)},
    activations=("gelu", *GELU_TANH),
    partial_rope=True,
    head="own",
    by_head="query_key_value",
)
GPT2 = GgufLayout(
    name="gpt2",
    numbers={"attention.layer_norm_epsilon": "layer_norm_epsilon"},
    fixed={"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)},
    activations=GELU_TANH,
    ropes=(),
)
