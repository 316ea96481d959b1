"""What is seen in a model before its weights are read equals what is in the model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GPT2Config

from benchmarks.small_models import small_config
from huarizo.errors import ModelError
from huarizo.model.load import load_base
from huarizo.model.skeleton import config_of, configuration, largest, seen_in, without_noise
from tests.tiny import make_model

SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt_neox", "gemma", "gpt2", "mixtral"])
def test_all_weights_are_counted_once(kind: str) -> None:
    fields: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50} if kind == "gpt2" else SIZES
    config = CONFIG_MAPPING[kind](**fields)
    model = AutoModelForCausalLM.from_config(config)
    sizes = seen_in(config.to_dict()).sizes
    counted = sizes.in_layers + sizes.embedding + sizes.others + (0 if sizes.tied else sizes.head)
    assert counted == sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
    assert sizes.tied == (kind in ("gemma", "gpt2")) and (sizes.layers, sizes.hidden) == (2, 32)
    assert bool(sizes.others) == (kind in ("gpt2", "mixtral"))  # positions, experts
    assert sizes.inner == {"gpt2": 128, "gemma": 1024, "mixtral": 32 + 2 * 48}.get(kind, 48)
    assert sizes.attention == (1024 if kind == "gemma" else 32)


def test_it_is_made_once_and_without_memory() -> None:
    config = make_model().config.to_dict()
    model = seen_in(config).model
    assert seen_in(dict(config)).model is model and all(tensor.is_meta for tensor in model.state_dict().values())


@pytest.mark.parametrize("change", [{"hidden_size": 7}, {"hidden_act": "none"}, {"num_hidden_layers": "x"}])
def test_what_makes_no_model_is_reported(change: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="some/config.json: no model can be made from it: "):
        seen_in(make_model().config.to_dict() | change, "some/config.json")


def test_no_dropout_of_the_base_is_left(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, resid_pdrop=0.3, embd_pdrop=0.2, attn_pdrop=0.1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    found: Any = config_of(tmp_path)
    assert found.resid_pdrop == found.embd_pdrop == found.attn_pdrop == 0
    base = load_base(tmp_path, torch.float32, torch.device("cpu")).train()
    assert all(module.p == 0 for module in base.modules() if isinstance(module, torch.nn.Dropout))


def test_the_jitter_of_routers_is_none() -> None:
    config: Any = without_noise(small_config("mixtral", router_jitter_noise=0.1))
    assert config.router_jitter_noise == 0


def test_infinities_are_read_as_transformers_writes_them() -> None:
    content = small_config("mamba2").to_dict() | {"time_step_limit": [0.0, {"__float__": "Infinity"}]}
    assert list(configuration(content).time_step_limit) == [0.0, float("inf")]


def test_the_largest_of_the_layers_is_taken() -> None:
    config = small_config("gemma4_text", per_layer_config={1: {"head_dim": 64}})
    assert (largest(config, "head_dim"), largest(config, "hidden_size"), largest(config, "none")) == (64, 64, None)
    assert seen_in(config.to_dict()).sizes.attention == 4 * 64
