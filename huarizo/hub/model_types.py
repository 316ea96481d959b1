"""Decides by config.json alone whether a model is one of text that answers word by word, before weights are fetched.

What Transformers' Auto classes know of its `model_type` is looked up; no code of the model runs and nothing is loaded.
"""

import re
from collections.abc import Mapping
from typing import Any

from huarizo.wording import excerpt

PERCEPTION = re.compile("audio|image|speech|video|vision|vq_")
"""In the names of a model's parts that are not for text."""
UNSUITED = {
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        "it drafts tokens for another model, whose hidden states it reads",
    ),
    "blt": "it reads patches of bytes, which a second model inside cuts",
    "hrm_text": "its files hold linear layers fused, and a LoRA on one of them can't be merged",
    "phimoe": "in training it sends tokens to experts at random",
}
"""Causal models of Transformers that can't be trained all the same -> the reason."""
OWN = "Give a decoder-only language model, such as TinyLlama/TinyLlama-1.1B-Chat-v1.0"


def unsuitable(config: object) -> str | None:
    """Why a model can't be trained as a causal language model, with the remedy; None if it can.

    config: the content of config.json.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(kind, str):
        return f"config.json has no model_type, so it is not that of a model in Transformers' format. {OWN}"
    named = f"model_type {excerpt(kind)}{_classes(config)}"
    if kind not in CONFIG_MAPPING:
        return f"Transformers {__version__} does not know its architecture ({named}). {OWN}"
    known: Any = CONFIG_MAPPING[kind]
    parts = {*known.sub_configs, *(name for name, part in config.items() if isinstance(part, dict))}
    if any(PERCEPTION.search(part) for part in parts):
        remedy = _text_model(config, known)
        return f"it is made for images or sound too ({named}), and Huarizo trains models of text. {remedy}"
    if config.get("is_encoder_decoder", getattr(known, "is_encoder_decoder", False)):
        return f"it has an encoder and a decoder ({named}), and Huarizo trains decoder-only models. {OWN}"
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.get("is_decoder"):
        return f"it is an encoder, which reads texts in both directions and writes none ({named}). {OWN}"
    if known not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return f"Transformers has no causal language model of its architecture ({named}). {OWN}"
    if kind in UNSUITED:
        return f"{UNSUITED[kind]} ({named}). {OWN}"
    return None


def _classes(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return f", {', '.join(map(str, names))[:100]}" if isinstance(names, list) and names else ""


def _text_model(config: Mapping[str, Any], known: Any) -> str:
    """The remedy: the text model inside, if it is one that can be trained. known: Transformers' class for `config`."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    part, default = config.get("text_config"), known.sub_configs.get("text_config")
    kind = part.get("model_type") if isinstance(part, dict) else getattr(default, "model_type", None)
    if isinstance(kind, str) and kind in CONFIG_MAPPING and CONFIG_MAPPING[kind] in MODEL_FOR_CAUSAL_LM_MAPPING:
        return f"Its text model has the model_type {kind!r}: give one of these that is published alone"
    return OWN
