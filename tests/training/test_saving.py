"""Checkpoints are written by time, within their share of it, and a run stops at its time limit."""

from pathlib import Path

import pytest
from rich.console import Console

from huarizo.errors import Interrupted
from huarizo.recipe import Recipe
from huarizo.runs import Run
from huarizo.training.finetune import fine_tune, resume
from tests.training.make import edit_recipe, printed


def test_a_session_that_ends_is_left_in_time(recipe: Recipe, console: Console) -> None:
    recipe.training.max_minutes = 1e-6
    with pytest.raises(Interrupted, match=r"at training.max_minutes=1e-06 after step 1 of 6, which is saved.*resume"):
        fine_tune(recipe, console=console)
    assert recipe.output is not None
    edit_recipe(Run(Path(recipe.output)), "training.max_minutes", None)
    resume(Run(Path(recipe.output)), console)
    assert "resuming from step 1" in printed(console) and "changed since" not in printed(console)


def test_checkpoints_come_by_time_but_cost_no_more_than_a_hundredth(
    recipe: Recipe, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe.training.save_every, recipe.training.save_minutes = None, 1e-6
    fine_tune(recipe, console=console)
    assert printed(console).count("saved step") < 6, "after a checkpoint there is a hundred times its cost without one"
    assert "saved step 1\n" in printed(console) and "saved step 6\n" in printed(console)
