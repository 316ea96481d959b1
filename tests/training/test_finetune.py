"""An unfinished run is offered to be resumed, and resuming touches only the run's own files."""

from pathlib import Path

import pytest
from rich.console import Console

from huarizo.errors import UserError
from huarizo.recipe import Recipe
from huarizo.runs import Run
from huarizo.training.finetune import fine_tune, resume
from tests.training.make import printed


def test_the_same_command_offers_to_resume(stopped: Run, recipe: Recipe, console: Console) -> None:
    asked: list[Run] = []

    def no(run: Run) -> bool:
        asked.append(run)
        return False

    with pytest.raises(UserError, match="huarizo resume"):
        fine_tune(recipe, resume_instead=no)
    assert asked == [stopped]
    other = recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"r": 2})})
    with pytest.raises(UserError, match="huarizo resume"):
        fine_tune(other, resume_instead=no)
    assert len(asked) == 1, "another recipe is not offered"
    result = fine_tune(recipe, console=console, resume_instead=lambda run: True)
    assert "resuming from step 4" in printed(console) and result.run == stopped and stopped.is_complete()
    with pytest.raises(UserError, match="complete"):
        resume(stopped)


def test_checkpoints_that_are_a_link_are_refused(stopped: Run, tmp_path: Path) -> None:
    stopped.checkpoints.rename(tmp_path / "elsewhere")
    stopped.checkpoints.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / ".mine.0123abcd.tmp").write_text("precious")
    with pytest.raises(UserError, match=r"checkpoints: is a link"):
        resume(stopped, Console(quiet=True))
    assert (tmp_path / "elsewhere" / ".mine.0123abcd.tmp").read_text() == "precious"
