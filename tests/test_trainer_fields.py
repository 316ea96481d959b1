"""The recipe's `trainer:`: fields that exist, that nothing else decides, and that are of their types."""

import pytest

from huarizo.errors import RecipeError
from huarizo.recipe import make_recipe
from huarizo.trainer_fields import DECIDED_ELSEWHERE, check_trainer_fields


@pytest.mark.parametrize("name", sorted(DECIDED_ELSEWHERE))
def test_fields_that_contradict_the_recipe_are_refused_by_name(name: str) -> None:
    from transformers import TrainingArguments

    assert name in TrainingArguments.__dataclass_fields__
    with pytest.raises(RecipeError, match=f"'{name}' can't be set here"):
        make_recipe(trainer={name: 1})


def test_settings_of_the_trainer_are_of_their_types() -> None:
    assert make_recipe(trainer={"max_grad_norm": "1", "report_to": "none"}).trainer["max_grad_norm"] == 1.0
    with pytest.raises(RecipeError, match=r"'logging_steps': .*valid number.*; 'report_to': .*not True"):
        make_recipe(trainer={"logging_steps": "often", "report_to": True})


def test_all_mistakes_are_found_together() -> None:
    with pytest.raises(ValueError, match=r"'fp16' can't be set .*; 'warmup_stps' is not .*; 'logging_steps': "):
        check_trainer_fields({"fp16": True, "warmup_stps": 3, "logging_steps": "often", "max_grad_norm": 1})
