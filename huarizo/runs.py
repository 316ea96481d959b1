"""A run's folder: where each of its files stands, and how a run is found by name.

recipe.yaml        the resolved recipe          plan.json       what the machine makes of it
adapter/           the result                   metrics.jsonl   one JSON object a logged step
checkpoints/       step-000120/ ...             events.jsonl    what happened, one JSON object each
loss.png           the curves                   samples.jsonl   prompt, before, after
skipped.jsonl      bad rows, with data.on_bad_row=skip
evaluations/       TIME/ ..., of `huarizo eval`
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
    """A run folder."""

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
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def loss_plot(self) -> Path:
        return self.path / "loss.png"

    @property
    def skipped(self) -> Path:
        return self.path / "skipped.jsonl"

    def is_complete(self) -> bool:
        """Whether the adapter is there, and the plot, which is written last."""
        return (self.adapter / "adapter_model.safetensors").is_file() and self.loss_plot.is_file()

    def recipe(self) -> Recipe:
        """The resolved recipe of the run."""
        return load_recipe(self.recipe_file)


def unfinished_runs(output: str | None, recipe_name: str) -> list[Run]:
    """Runs without a result at `output`, or of this recipe's name under runs/, the newest first."""
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
    """The folder of a new run; not made yet.

    Raises:
        UserError: `output` holds a run already, or is no folder.
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
            f"{path}: there is something here already. Go on with it by `huarizo resume {path}`, name another folder "
            "with output=..., or remove it"
        )
    return Run(path)


def _is_free(path: Path) -> bool:
    """Whether a folder is empty, but for what a run leaves that is killed before it wrote its recipe."""
    if not path.is_dir():
        return False
    entries = {entry.name: entry for entry in path.iterdir() if not LEFTOVER.fullmatch(entry.name)}
    entries.pop(".lock", None)
    checkpoints = entries.pop("checkpoints", None)
    return not entries and (checkpoints is None or (checkpoints.is_dir() and not any(checkpoints.iterdir())))


def find_run(name: Path | str) -> Run | None:
    """An existing run, by its folder or by its name under `runs/`; None where there is none."""
    for path in (Path(name).expanduser(), Path("runs") / name):
        if (path / "recipe.yaml").is_file():
            return Run(path)
    return None


def open_run(name: Path | str) -> Run:
    """As `find_run`.

    Raises:
        UserError: there is no such run; the message lists those there are.
    """
    run = find_run(name)
    if run is not None:
        return run
    there = sorted(str(p.parent) for p in Path("runs").glob("*/recipe.yaml"))
    known = f"The runs here are {', '.join(there[-5:])}" if there else "Name the folder that `huarizo train` printed"
    raise UserError(f"{name}: this is no run folder (it has no recipe.yaml). {known}")
