"""The commands that train: start a new run, or resume an interrupted one."""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from huarizo.commands.options import RunName
from huarizo.console import confirm, console, quiet_libraries
from huarizo.host import rank
from huarizo.recipe import load_recipe, with_overrides
from huarizo.runs import Run, open_run

if TYPE_CHECKING:
    from huarizo.training.session import Result

app = typer.Typer()


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="a YAML file, such as recipes/quickstart.yaml")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="settings that override the recipe, such as lora.r=16"),
    ] = None,
    show_data: Annotated[
        int, typer.Option(metavar="N", min=0, help="print N rows as the model sees them, then exit")
    ] = 0,
    resume: Annotated[
        bool | None,
        typer.Option(help="resume an unfinished run of the same recipe and data, if there is one; default: ask"),
    ] = None,
) -> None:
    """Train from a recipe. The last word of the last line printed is the run folder."""
    _greet()
    loaded = load_recipe(recipe, overrides or [])
    quiet_libraries()
    if show_data:
        from huarizo.data.show import show_examples
        from huarizo.training.prepare import prepare

        show_examples(console(), prepare(with_overrides(loaded, ["training.compile=false"])).data, show_data)
        return

    from huarizo.training.finetune import fine_tune

    def resume_instead(run: Run) -> bool:
        if resume is None and sys.stdin.isatty():
            return confirm(f"{run.path} is an unfinished run of this recipe. Resume it?", default=True)
        if not resume:
            print(f"{run.path} is an unfinished run of this recipe: huarizo resume {run.path}")
        return bool(resume)

    _show_result(fine_tune(loaded, recipe.stem, console(outlives_reader=True), resume_instead))


@app.command("resume")
def resume_run(run: RunName) -> None:
    """Resume an interrupted run from its last checkpoint."""
    _greet()
    opened = open_run(run)
    quiet_libraries()
    from huarizo.training.finetune import resume

    _show_result(resume(opened, console(outlives_reader=True)))


def _greet() -> None:
    """Print a line at once, because PyTorch takes seconds to load."""
    if rank() == 0:
        print(f"{'huarizo':<10} {version('huarizo')}, loading PyTorch", flush=True)


def _show_result(result: "Result") -> None:
    from huarizo.results.report import show_summary

    if rank() == 0:
        show_summary(console(), result.run, result.metrics, result.samples, result.in_gguf)
        print(f"done: {result.run.path}")
