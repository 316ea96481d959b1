"""The commands. Each one calls a function of the library; errors become one message on stderr and an exit code.

0 done; 2 the user's mistake; 3 the machine's fault; 130 interrupted, after a checkpoint.
"""

import logging
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from huarizo.errors import HuarizoError, UserError
from huarizo.recipe import fields, load_recipe, type_of
from huarizo.runs import Run, open_run

app = typer.Typer(
    help="Fine-tune TinyLlama, or any Llama-architecture model, with LoRA on instruction data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
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
    loaded = load_recipe(recipe, overrides or [])
    _quiet_libraries()
    from huarizo import finetune

    if show_data:
        from huarizo.results.show_data import show_examples

        show_examples(_console(), finetune.prepare(loaded).data, show_data)
        return

    def go_on(run: Run) -> bool:
        if resume is None and sys.stdin.isatty():
            return typer.confirm(f"{run.path} is an unfinished run of this recipe. Go on with it?", default=True)
        if not resume:
            print(f"{run.path} is an unfinished run of this recipe: huarizo resume {run.path}")
        return bool(resume)

    _tell_result(finetune.fine_tune(loaded, recipe.stem, _console(), go_on))


@app.command("resume")
def resume_run(run: RunName) -> None:
    """Go on with an interrupted run from its last checkpoint."""
    _quiet_libraries()
    from huarizo import finetune

    _tell_result(finetune.resume(open_run(run), _console()))


@app.command()
def ask(
    run: RunName,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 = the likeliest token every time")] = 0,
) -> None:
    """Answer one prompt with a trained run."""
    _quiet_libraries()
    from huarizo.data.prompts import OpenExchange
    from huarizo.results.chat import open_assistant, stream_answer

    assistant = open_assistant(open_run(run))
    stream_answer(assistant, [OpenExchange(prompt)], _write, max_new_tokens=max_new_tokens, temperature=temperature)
    print()


@app.command()
def chat(
    run: RunName,
    system: Annotated[str, typer.Option(help="a system message in front of the conversation")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 = the likeliest token every time")] = 0,
) -> None:
    """Talk with a trained run."""
    _quiet_libraries()
    from huarizo.results.chat import converse, open_assistant

    assistant = open_assistant(open_run(run))
    print("/reset begins anew, /exit or Ctrl-D ends, Ctrl-C stops an answer")
    converse(assistant, input, _write, system, max_new_tokens, temperature)


@app.command()
def merge(
    run: RunName,
    out: Annotated[Path | None, typer.Argument(metavar="[OUT]", help="folder; default RUN/merged")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace what is there")] = False,
) -> None:
    """Add the adapter to the base's float weights and save an ordinary model folder."""
    _quiet_libraries()
    from huarizo.results import merge as merging
    from huarizo.results.tuned import open_tuned

    found = open_run(run)
    print(f"merged: {merging.merge(open_tuned(found), out or found.path / 'merged', force)}")


class ExportType(StrEnum):
    """Number formats of a GGUF file."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"


@app.command()
def export(
    run: RunName,
    to: Annotated[str, typer.Option(help="the format: gguf")] = "gguf",
    kind: Annotated[ExportType, typer.Option("--type", help="of the weights")] = ExportType.F16,
    out: Annotated[Path | None, typer.Option(help="file; default RUN/NAME-TYPE.gguf")] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="the LoRA alone, for a GGUF of its base")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="load it in llama.cpp and compare with Transformers")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="replace what is there")] = False,
) -> None:
    """Write the tuned model as one GGUF file, for llama.cpp and Ollama."""
    if to != "gguf":
        raise UserError(f"--to {to}: gguf is the only format. For a model folder: huarizo merge {run}")
    _quiet_libraries()
    from huarizo.results.gguf import export_adapter, export_gguf
    from huarizo.results.tuned import open_tuned

    found = open_run(run)
    tuned = open_tuned(found)
    if adapter:
        print(f"exported: {export_adapter(tuned, out or found.path / f'{found.path.name}-adapter.gguf', force)}")
        return
    file = export_gguf(tuned, out or found.path / f"{found.path.name}-{kind.value}.gguf", kind.value, force)
    if verify:
        from huarizo.results.verify import compare_with_transformers

        print(compare_with_transformers(tuned, file))
    print(f"exported: {file}")


@app.command()
def doctor() -> None:
    """Tell what this machine can do, measured, and what that means for training."""
    _quiet_libraries()
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


def _console() -> Console:
    return Console(markup=False, highlight=False, soft_wrap=True)


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _quiet_libraries() -> None:
    """Our own messages only; the libraries' warnings are not the user's business."""
    import warnings

    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    logging.getLogger("huarizo").setLevel(logging.WARNING)


def _tell_result(result: Any) -> None:
    from huarizo.machine import rank
    from huarizo.results.report import show_summary

    if rank() == 0:
        show_summary(_console(), result.run, result.metrics, result.samples)
        print(f"done: {result.run.path}")


def main() -> None:
    """Entry point of the `huarizo` command."""
    try:
        app()
    except HuarizoError as error:
        Console(stderr=True, soft_wrap=True).print(Text(f"huarizo: {error}"))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("huarizo: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
