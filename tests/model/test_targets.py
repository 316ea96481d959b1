"""`all-linear` names every linear layer that PEFT has a LoRA for, and nothing else."""

from pathlib import Path

import pytest

from benchmarks.small_models import save_small, small_config
from huarizo.errors import RecipeError
from huarizo.model.lora import check_lora
from huarizo.model.skeleton import empty_model, seen_in
from huarizo.model.targets import all_linear, has_lora, left_out, means_experts, with_targets
from huarizo.recipe import LoraRecipe

ALL = LoraRecipe(target_modules="all-linear")


def test_a_name_that_other_modules_have_is_lengthened() -> None:
    model = empty_model(small_config("ctrl", n_layer=3))
    assert all_linear(model) == ["Wq", "Wk", "Wv", "dense", "ffn.0", "ffn.2"]


def test_what_peft_takes_for_experts_is_left_out_and_said(tmp_path: Path) -> None:
    config = small_config("deepseek_v3")
    model = seen_in(config.to_dict()).model
    assert all_linear(model) == ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    assert means_experts(model, "gate_proj") and not means_experts(model, "o_proj")
    assert left_out(ALL, config.to_dict()) == "gate_proj, up_proj, down_proj, the experts"
    assert not left_out(LoraRecipe(), config.to_dict())
    save_small(config, tmp_path)
    for names in (["gate_proj"], ["gate_proj", "up_proj"]):
        with pytest.raises(RecipeError, match=r"PEFT takes 'gate_proj' for the weights of .* experts.* Name others: q"):
            check_lora(tmp_path, LoraRecipe(target_modules=names), "fp32")


def test_experts_without_such_names_are_said_too() -> None:
    config = small_config("gpt_oss").to_dict()
    assert left_out(ALL, config) == "the experts" and not left_out(ALL, small_config("llama").to_dict())


def test_what_peft_refuses_in_state_space_models_is_left_out() -> None:
    config = small_config("falcon_mamba")
    model = seen_in(config.to_dict()).model
    assert not has_lora(model, "out_proj") and all_linear(model) == ["in_proj", "x_proj", "dt_proj"]
    assert with_targets(LoraRecipe(), config.to_dict()).target_modules == "all-linear"


def test_a_router_of_its_own_kind_is_no_linear_layer() -> None:
    assert "router" not in all_linear(empty_model(small_config("llama4_text")))


def test_the_default_needs_all_its_layers() -> None:
    assert with_targets(LoraRecipe(), small_config("zaya").to_dict()).target_modules == "all-linear"
