"""Fixtures of a run: its recipe, a console to read from, and a run that was killed."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from huarizo.events import Event, Step
from huarizo.recipe import Recipe, make_recipe
from huarizo.runs import Run
from huarizo.training.finetune import fine_tune


class Killed(BaseException):
    """Stands for a kill: our code does not catch it."""


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_folder: Path, alpaca_file: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return make_recipe(
        model=str(tiny_model_folder), data={"train": str(alpaca_file), "eval": 2}, precision="fp32", samples=1,
        lora={"dropout": 0.2}, training={"epochs": 2, "save_every": 2, "compile": False}, output=str(tmp_path / "run"),
    )  # fmt: skip


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=500)


@pytest.fixture
def stopped(recipe: Recipe) -> Iterator[Run]:
    """A run that was killed after its fifth step; four are saved."""

    def killer(event: Event) -> None:
        if isinstance(event, Step) and event.step == 5:
            raise Killed

    with pytest.raises(Killed):
        fine_tune(recipe, console=Console(quiet=True), listeners=[killer])
    assert recipe.output is not None
    yield Run(Path(recipe.output))
