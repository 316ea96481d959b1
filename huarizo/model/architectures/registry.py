"""The architectures by the `model_type` of config.json: a row for each that is trained on packed rows, whose
padding counts, or that does something to its logits.

`packs` is set only where packed training is shown to equal Transformers' own, example by example
(tests/model/architectures/test_registry.py). A causal model of Transformers without a row has none of either.
"""

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from huarizo.model.architectures import gguf_layouts as layouts
from huarizo.model.architectures.architecture import Architecture, LogitFields

CAPPED = LogitFields(capped_at="final_logit_softcapping")
DIVIDED = LogitFields(divided_by="logits_scaling")
SCALED = LogitFields(multiplied_by="logit_scale")

ROWS = (
    Architecture(model_type="llama", packs=True, gguf=layouts.LLAMA),
    Architecture(model_type="cohere", packs=True, logits=SCALED, gguf=layouts.COHERE),
    Architecture(model_type="cohere2", packs=True, logits=SCALED, gguf=layouts.COHERE2),
    Architecture(model_type="gemma", packs=True, gguf=layouts.GEMMA),
    Architecture(model_type="gemma2", packs=True, logits=CAPPED, gguf=layouts.GEMMA2),
    Architecture(model_type="gemma3_text", packs=True, logits=CAPPED, gguf=layouts.GEMMA3),
    Architecture(model_type="glm4", packs=True, gguf=layouts.GLM4),
    Architecture(model_type="gpt2", packs=True, gguf=layouts.GPT2),
    Architecture(model_type="gpt_oss", packs=True),
    Architecture(model_type="gpt_neox", packs=True, gguf=layouts.GPT_NEOX),
    Architecture(model_type="granite", packs=True, logits=DIVIDED, gguf=layouts.GRANITE),
    Architecture(model_type="mistral", packs=True, gguf=layouts.LLAMA),
    Architecture(model_type="olmo2", packs=True, gguf=layouts.OLMO2),
    Architecture(model_type="olmo3", packs=True, gguf=layouts.OLMO2),
    Architecture(model_type="phi3", packs=True, gguf=layouts.PHI3),
    Architecture(model_type="qwen2", packs=True, gguf=layouts.QWEN2),
    Architecture(model_type="qwen3", packs=True, gguf=layouts.QWEN3),
    Architecture(model_type="smollm3", packs=True, gguf=layouts.SMOLLM3),
    Architecture(model_type="stablelm", packs=False, gguf=layouts.STABLELM),
    Architecture(model_type="beam", packs=False, logits=CAPPED),
    Architecture(model_type="cohere2_moe", packs=False, logits=SCALED),
    Architecture(model_type="cohere_compass_text", packs=False, logits=SCALED),
    Architecture(model_type="doge", packs=False, pads=False),  # without a mask, the keys that it keeps may come later
    Architecture(model_type="falcon_h1", packs=False, logits=LogitFields(multiplied_by="lm_head_multiplier")),
    Architecture(model_type="gemma3n_text", packs=False, logits=CAPPED),
    Architecture(model_type="gemma4_text", packs=False, logits=CAPPED),
    Architecture(model_type="gemma4_unified_text", packs=False, logits=CAPPED),
    Architecture(model_type="granite_swa", packs=False, logits=DIVIDED),
    Architecture(model_type="granitemoe", packs=False, logits=DIVIDED),
    Architecture(model_type="granitemoe_swa", packs=False, logits=DIVIDED),
    Architecture(model_type="granitemoehybrid", packs=False, logits=DIVIDED),
    Architecture(model_type="granitemoeshared", packs=False, logits=DIVIDED),
    Architecture(model_type="hyperclovax", packs=False, logits=LogitFields(multiplied_by="logits_scaling")),
    Architecture(model_type="nanochat", packs=False, logits=CAPPED),
    Architecture(model_type="recurrent_gemma", packs=False, logits=LogitFields(capped_at="logits_soft_cap")),
    Architecture(model_type="vaultgemma", packs=False, logits=CAPPED),
)
ARCHITECTURES = {row.model_type: row for row in ROWS}

EMBEDDINGS = frozenset({"embed_in", "embed_tokens", "embeddings", "tokens_embed", "w", "word_embeddings", "wte"})
HEADS = frozenset({"embed_out", "head", "lm_head", "output_projection"})
"""Last parts of the names of embeddings and heads in Transformers' causal models: an adapter file doesn't say which
model it is for."""


def architecture_of(config: Mapping[str, Any] | PretrainedConfig) -> Architecture:
    """The architecture of a model.

    config: the content of config.json, or Transformers' configuration.
    """
    found: str = config["model_type"] if isinstance(config, Mapping) else config.model_type
    return ARCHITECTURES.get(found) or Architecture(model_type=found, packs=False)
