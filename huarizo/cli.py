"""The commands to train with. Each one calls a function of the library.

Errors become one message on stderr and an exit code:
0 done; 2 the user's mistake; 3 the machine's fault; 130 interrupted, with what was trained in a checkpoint.
"""

import errno
import io
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from huarizo import cli_results
from huarizo.console import confirm, console, keep_terminal_plain, quiet_libraries
from huarizo.errors import HuarizoError, MachineError, UserError
from huarizo.host import rank
from huarizo.recipe import fields, load_recipe, type_of
from huarizo.runs import Run, open_run

app = typer.Typer(
    help="Fine-tune TinyLlama, or any Llama-architecture model, with LoRA on instruction data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(cli_results.app)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
RunName = Annotated[str, typer.Argument(metavar="RUN", help="a run folder, or its name under runs/")]


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="a YAML file, such as recipes/quickstart.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="lora.r=16 ...")] = None,
    show_data: Annotated[
        int, typer.Option(metavar="N", min=0, help="print N rows as the model sees them, and stop")
    ] = 0,
    resume: Annotated[
        bool | None, typer.Option(help="go on with an unfinished run of the same recipe and data; default: ask")
    ] = None,
) -> None:
    """Train by a recipe. The last word of the last line is the run folder."""
    _greet()
    loaded = load_recipe(recipe, overrides or [])
    quiet_libraries()
    from huarizo import finetune

    if show_data:
        from huarizo.results.show_data import show_examples

        show_examples(console(), finetune.prepare(loaded).data, show_data)
        return

    def go_on(run: Run) -> bool:
        if resume is None and sys.stdin.isatty():
            return confirm(f"{run.path} is an unfinished run of this recipe. Go on with it?", default=True)
        if not resume:
            print(f"{run.path} is an unfinished run of this recipe: huarizo resume {run.path}")
        return bool(resume)

    _tell_result(finetune.fine_tune(loaded, recipe.stem, console(outlives_reader=True), go_on))


@app.command("resume")
def resume_run(run: RunName) -> None:
    """Go on with an interrupted run from its last checkpoint."""
    _greet()
    opened = open_run(run)
    quiet_libraries()
    from huarizo import finetune

    _tell_result(finetune.resume(opened, console(outlives_reader=True)))


@app.command()
def doctor() -> None:
    """Tell what this machine can do, measured, and what that means for training."""
    quiet_libraries()
    from huarizo.doctor import diagnosis

    for title, line in diagnosis().items():
        print(f"{title:<14} {line}")


@app.command("recipe")
def show_recipe(markdown: Annotated[bool, typer.Option("--markdown", help="as a table, for the docs")] = False) -> None:
    """Print every setting of a recipe: type, range, default, help."""
    if markdown:
        print(
            "# The recipe\n\nWritten by `make docs`.\n\n"
            "| key | type and range | default | what it is |\n|---|---|---|---|"
        )
    for key, field in fields():
        default = field.get_default(call_default_factory=True)
        shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
        if markdown:
            cells = (f"`{key}`", type_of(field), f"`{shown}`", field.description or "")
            print("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        else:
            print(f"{key}  ({type_of(field)}; default {shown})\n    {field.description}")


def _greet() -> None:
    """A line at once: PyTorch takes some seconds to load, and more on a machine that is busy or cold."""
    if rank() == 0:
        print(f"{'huarizo':<10} {version('huarizo')}, loading PyTorch", flush=True)


def _tell_result(result: Any) -> None:
    from huarizo.results.report import show_summary

    if rank() == 0:
        show_summary(console(), result.run, result.metrics, result.samples)
        print(f"done: {result.run.path}")


def main() -> None:
    """Entry point of the `huarizo` command."""
    if sys.stdin is None:  # closed by who started it
        sys.stdin = io.StringIO()
    if sys.stdout is None:
        sys.stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an answer may hold letters that a terminal does not have
    keep_terminal_plain()
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # so that what can't be written is told here
    except HuarizoError as error:
        console(stderr=True).print(f"huarizo: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("huarizo: interrupted", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            print(f"huarizo: {error.filename}: no file can have so long a name", file=sys.stderr)
            sys.exit(UserError.exit_code)
        if error.errno not in (*FULL, errno.EPIPE):
            raise
        if error.filename is not None:
            print(f"huarizo: {error.filename}: {error.strerror}", file=sys.stderr)
            sys.exit(MachineError.exit_code)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in its buffer
        if error.errno == errno.EPIPE:
            sys.exit(1)  # who read it has left
        print(f"huarizo: what is printed can't be written: {error.strerror}", file=sys.stderr)
        sys.exit(MachineError.exit_code)


if __name__ == "__main__":
    main()
