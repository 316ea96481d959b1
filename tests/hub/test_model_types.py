"""What is no causal language model is told by config.json alone, before any weights are fetched."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from huarizo.errors import ModelError
from huarizo.hub.model_types import unsuitable
from huarizo.hub.names import resolve_model

REFUSED: dict[str, tuple[Any, str]] = {
    "encoder and decoder": ({"model_type": "t5"}, "it has an encoder and a decoder .model_type 't5'."),
    "speech": ({"model_type": "whisper"}, "it has an encoder and a decoder"),
    "encoder": ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "'bert', BertForMaskedLM.*decoder-only"),
    "images": ({"model_type": "gemma3"}, "images or sound .*'gemma3'.* Its text model has the model_type 'gemma3_text'"),
    "images, text named": (
        {"model_type": "llava", "vision_config": {}, "text_config": {"model_type": "mistral"}}, "model_type 'mistral': give",
    ),
    "images, text of no kind": (
        {"model_type": "llava", "vision_config": {}, "text_config": {"model_type": ["x"]}}, "Give a decoder-only",
    ),
    "sound": ({"model_type": "qwen2_audio"}, "images or sound"),
    "pictures alone": ({"model_type": "vit"}, "no causal language model of its architecture"),
    "a draft": ({"model_type": "gemma4_assistant"}, "drafts tokens for another model, .*model_type 'gemma4_assistant'"),
    "bytes in patches": ({"model_type": "blt"}, "reads patches of bytes"),
    "fused in files": ({"model_type": "hrm_text"}, "its files hold linear layers fused"),
    "routed at random": ({"model_type": "phimoe"}, "in training it sends tokens to experts at random"),
    "unknown": ({"model_type": "mpt-7b-custom", "architectures": ["X"]}, "does not know .*'mpt-7b-custom', X"),
    "nothing": ({}, "config.json has no model_type"),
    "no object": ([], "config.json has no model_type"),
    "a list": ({"model_type": ["llama"]}, "config.json has no model_type"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_refused_with_its_kind_and_a_remedy(case: str) -> None:
    config, said = REFUSED[case]
    problem = unsuitable(config)
    assert problem is not None and re.search(said, problem), problem
    assert "Give a decoder-only language model" in problem or "give one of these" in problem


@pytest.mark.parametrize(
    "kind",
    ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "falcon", "mamba", "dbrx",
     "mixtral", "qwen3_moe", "gpt_oss", "bloom", "opt"],
)  # fmt: skip
def test_a_causal_model_is_taken(kind: str) -> None:
    assert unsuitable(CONFIG_MAPPING[kind]().to_dict()) is None and unsuitable({"model_type": kind}) is None


def test_a_folder_is_refused_by_its_configuration(tiny_model_folder: Path) -> None:
    path = tiny_model_folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "t5"}))
    with pytest.raises(ModelError, match=f"^{tiny_model_folder}: it has an encoder and a decoder"):
        resolve_model(str(tiny_model_folder))
