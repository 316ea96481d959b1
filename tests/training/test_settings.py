"""Settings of `trainer:` that can't work are refused before rows are read or a run folder is made; the others train."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from huarizo.errors import RecipeError
from huarizo.plan import Choice
from huarizo.recipe import Recipe, make_recipe
from huarizo.training.finetune import fine_tune
from huarizo.training.settings import PACKAGES, check_trainer_settings

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no such tracker": ({"report_to": "tensorbord"}, r"trainer.report_to: 'tensorbord' is none of .*mean 'tensorboard'"),
    "no such optimizer": ({"optim": "adamw_8bt"}, "trainer: adamw_8bt is not a valid OptimizerNames"),
    "no package": ({"optim": "adamw_anyprecision"}, "trainer.optim=adamw_anyprecision: .*install"),
    "steps in the backward pass": ({"optim": "lomo"}, "trainer.optim: lomo changes weights during the backward"),
    "layer by layer": ({"optim": "galore_adamw_layerwise"}, "changes weights during the backward"),
    "optimizer's settings": ({"optim_args": "a"}, "trainer.optim=adamw_torch_fused: "),
    "a range": ({"adam_beta1": 2}, "trainer.optim=adamw_torch_fused: Invalid beta"),
    "no such schedule": ({"lr_scheduler_type": "cosin"}, "trainer: cosin is not a valid SchedulerType"),
    "schedule's settings": ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type=cosine_with_min_lr: .*min_lr"),
    "unknown setting": ({"lr_scheduler_kwargs": {"x": 2}}, "lr_scheduler_type=linear: .*'x'"),
    "no evaluation": ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "requires an eval strategy"),
}  # fmt: skip
RIGHT: list[dict[str, Any]] = [
    {"optim": "adafactor"}, {"optim": "sgd"}, {"optim": "rmsprop", "weight_decay": 0.1}, {"optim": "adagrad"},
    {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    {"report_to": "none"}, {"report_to": "all"}, {"report_to": []}, {"max_grad_norm": 0.5, "logging_steps": 2},
    {"gradient_checkpointing": True}, {"warmup_steps": 0.1},
]  # fmt: skip
CPU, FP32 = torch.device("cpu"), Choice("fp32", "", torch.float32)


@pytest.mark.parametrize("wrong", WRONG)
def test_what_can_not_work_is_reported_and_leaves_nothing(wrong: str, tmp_path: Path) -> None:
    settings, said = WRONG[wrong]
    recipe = make_recipe(
        model=str(tmp_path / "none"), data={"train": str(tmp_path / "no.json")}, trainer=settings, precision="fp32",
        output=str(tmp_path / "run"),
    )  # fmt: skip
    with pytest.raises(RecipeError, match=said):
        fine_tune(recipe)
    assert not any(tmp_path.iterdir())


def test_a_tracker_that_is_not_installed_is_reported_with_what_installs_it() -> None:
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    absent = sorted(PACKAGES.keys() - set(get_available_reporting_integrations()))
    assert absent
    with pytest.raises(RecipeError) as error:
        check_trainer_settings(make_recipe(trainer={"report_to": absent}), FP32, CPU)
    assert all(f"{name} is not installed: pip install {PACKAGES[name]}" in str(error.value) for name in absent)


@pytest.mark.parametrize("settings", RIGHT, ids=str)
def test_what_works_is_taken_and_draws_no_random_number(settings: dict[str, Any]) -> None:
    before = torch.get_rng_state()
    check_trainer_settings(make_recipe(trainer=settings), FP32, CPU)
    assert torch.equal(before, torch.get_rng_state())


def test_a_plateau_needs_the_held_out_loss_and_then_works() -> None:
    recipe = make_recipe(trainer={"lr_scheduler_type": "reduce_lr_on_plateau"}, training={"eval_every": 2})
    check_trainer_settings(recipe, FP32, CPU)


def test_the_recipe_in_the_readme_works() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    match = re.search(r"```yaml\n(model: .*?)```", text, re.DOTALL)
    assert match
    recipe = Recipe.model_validate(yaml.safe_load(match[1]))
    assert recipe.trainer["lr_scheduler_type"] == "cosine"
    check_trainer_settings(recipe, FP32, CPU)
