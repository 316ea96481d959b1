"""The run folder: the paths of its files, and finding a run by name.

recipe.yaml        the resolved recipe          plan.json       how this machine computes it
adapter/           the result                   metrics.jsonl   one JSON object per logged step
checkpoints/       step-000120/ ...             events.jsonl    one JSON object per event
loss.png           the curves                   samples.jsonl   prompts, answers before and after
skipped.jsonl      bad rows, with data.on_bad_row=skip
calibration.safetensors    of an int8 base: what its layers were quantised by
evaluations/       TIME/ ..., written by `huarizo eval`
"""

import re
import time
from dataclasses import dataclass
from pathlib import Path

from huarizo.errors import UserError
from huarizo.files import LEFTOVER
from huarizo.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class Run:
    """The paths of a run folder."""

    path: Path

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def plan_file(self) -> Path:
        return self.path / "plan.json"

    @property
    def calibration(self) -> Path:
        return self.path / "calibration.safetensors"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def loss_plot(self) -> Path:
        return self.path / "loss.png"

    @property
    def skipped(self) -> Path:
        return self.path / "skipped.jsonl"

    def is_complete(self) -> bool:
        """Whether the adapter exists, and the plot, which is written last."""
        return (self.adapter / "adapter_model.safetensors").is_file() and self.loss_plot.is_file()

    def recipe(self) -> Recipe:
        """The resolved recipe of the run."""
        return load_recipe(self.recipe_file)


def unfinished_runs(output: str | None, recipe_name: str) -> list[Run]:
    """Unfinished runs, newest first: at `output` if given, else under runs/ with this recipe's name."""
    paths = (
        [Path(output).expanduser()] if output else sorted(Path("runs").glob(f"{_plain(recipe_name)}-*"), reverse=True)
    )
    runs = [Run(path) for path in paths if (path / "recipe.yaml").is_file()]
    return [run for run in runs if not run.is_complete() and _is_readable(run)]


def _is_readable(run: Run) -> bool:
    try:
        run.recipe()
    except UserError:
        return False
    return True


def _plain(recipe_name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", recipe_name).strip("-.") or "run"


def new_run(output: str | None, recipe_name: str) -> Run:
    """The folder for a new run. It is not created.

    Raises:
        UserError: `output` is not empty, or not a folder.
    """
    if output is None:
        base = Path("runs") / f"{_plain(recipe_name)}-{time.strftime('%Y%m%d-%H%M%S')}"
        path, number = base, 2
        while path.exists():
            path, number = base.with_name(f"{base.name}-{number}"), number + 1
        return Run(path)
    path = Path(output).expanduser()
    if path.exists() and not _is_free(path):
        raise UserError(
            f"{path}: already exists. Resume its run with `huarizo resume {path}`, choose another folder with "
            "output=..., or remove it"
        )
    return Run(path)


def _is_free(path: Path) -> bool:
    """Whether a folder is empty, except for what a run leaves if it is killed before it writes its recipe."""
    if not path.is_dir():
        return False
    entries = {entry.name: entry for entry in path.iterdir() if not LEFTOVER.fullmatch(entry.name)}
    entries.pop(".lock", None)
    checkpoints = entries.pop("checkpoints", None)
    return not entries and (checkpoints is None or (checkpoints.is_dir() and not any(checkpoints.iterdir())))


def find_run(name: Path | str) -> Run | None:
    """Find a run by its folder or by its name under runs/; None if there is none."""
    for path in (Path(name).expanduser(), Path("runs") / name):
        if (path / "recipe.yaml").is_file():
            return Run(path)
    return None


def open_run(name: Path | str) -> Run:
    """As `find_run`.

    Raises:
        UserError: there is no such run; the message lists the existing ones.
    """
    run = find_run(name)
    if run is not None:
        return run
    there = sorted(str(p.parent) for p in Path("runs").glob("*/recipe.yaml"))
    known = f"The runs here are {', '.join(there[-5:])}" if there else "Name the folder that `huarizo train` printed"
    raise UserError(f"{name}: not a run folder (it has no recipe.yaml). {known}")
