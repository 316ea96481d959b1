"""The commands for a trained result: compare, eval, merge, export, push."""

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from huarizo.commands.options import BaseModel, Force, MaxNewTokens, Precision, Prompt, ResultName, RunName
from huarizo.console import confirm, console, quiet_libraries
from huarizo.errors import Interrupted, ModelError, UserError
from huarizo.runs import open_run

app = typer.Typer()


def _name_and_overrides(words: list[str] | None) -> tuple[str | None, list[str]]:
    """Split the arguments after RUN into the name of rows or prompts, and `data.KEY=VALUE` overrides."""
    overrides = [word for word in words or [] if word.startswith("data.") and "=" in word]
    names = [word for word in words or [] if word not in overrides]
    if len(names) > 1:
        raise UserError(f"{names[1]}: only one file, folder or hub id can be named; the rest must be data.KEY=VALUE")
    return (names[0] if names else None), overrides


@app.command()
def compare(
    run: ResultName,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROMPTS] [KEY=VALUE]...",
            help="text file with one prompt a line, or rows; default: the run's own prompts",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="also write a .md, .html or .jsonl file")] = None,
    max_new_tokens: MaxNewTokens = 200,
    precision: Precision = "auto",
    prompt: Prompt = None,
    base_model: BaseModel = None,
    force: Force = False,
) -> None:
    """Show answers of the base and the tuned model side by side."""
    quiet_libraries()
    from huarizo.inference.artifact import find_tuned, read_otherwise
    from huarizo.inference.generate import open_assistant
    from huarizo.inference.samples import show_samples
    from huarizo.results import compare as comparing

    if out:
        comparing.check_target(out, force)
    file, overrides = _name_and_overrides(prompts)
    tuned = read_otherwise(find_tuned(run, prompt, base_model), overrides)
    asked = comparing.read_prompts(Path(file), tuned.recipe.data) if file else comparing.usual_prompts(tuned)
    samples = comparing.compare(open_assistant(tuned, precision), asked, max_new_tokens, console())
    if out:
        comparing.write_comparison(samples, f"{run}: base and tuned", out, force)
    show_samples(console(), samples)
    if out:
        print(f"compared: {out}")


@app.command("eval")
def evaluate(
    run: ResultName,
    data: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DATA] [KEY=VALUE]...", help="rows: a file, folder or hub id; default: the held-out rows"
        ),
    ] = None,
    to_answer: Annotated[int, typer.Option("--answers", min=0, help="number of rows to answer as well")] = 32,
    precision: Precision = "auto",
    out: Annotated[Path | None, typer.Option(help="output folder; default: RUN/evaluations/TIME")] = None,
    harness: Annotated[
        str | None, typer.Option(metavar="TASKS", help="run these lm-eval tasks instead, separated by commas")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="maximum number of questions per lm-eval task")] = None,
    prompt: Prompt = None,
    base_model: BaseModel = None,
    force: Force = False,
) -> None:
    """Measure loss, answers and forgetting. Base and tuned model are both measured."""
    quiet_libraries()
    from huarizo.inference.artifact import find_tuned, read_otherwise
    from huarizo.inference.generate import open_assistant
    from huarizo.results import evaluate as evaluating
    from huarizo.results.overwrite import check_folder

    name, overrides = _name_and_overrides(data)
    tuned = read_otherwise(find_tuned(run, prompt, base_model), overrides)
    target = out or tuned.folder / "evaluations" / time.strftime("%Y%m%d-%H%M%S")
    check_folder(target, force, evaluating.SUMMARY)
    if harness is not None:
        from huarizo.results.harness import run_harness

        tasks = [task.strip() for task in harness.split(",") if task.strip()]
        found = run_harness(lambda: open_assistant(tuned, precision), tasks, limit)
        evaluating.save_harness(found, target)
        print(json.dumps(found, indent=2))
    else:
        rows = evaluating.rows_of(tuned, name) if name else evaluating.heldout_rows(tuned)
        bad = tuned.recipe.data.on_bad_row
        evaluation = evaluating.evaluate(open_assistant(tuned, precision), rows, to_answer, console(), bad)
        evaluating.save(evaluation, target, result=run, data=name or "held out")
        evaluating.show(console(), evaluation)
        if evaluation.answers and evaluation.scores["after"].chrf is None:
            print("chrF was left out: pip install sacrebleu (or huarizo[eval])", file=sys.stderr)
    print(f"evaluated: {target}")


@app.command()
def merge(
    run: ResultName,
    out: Annotated[Path | None, typer.Argument(metavar="[OUT]", help="output folder; default: RUN/merged")] = None,
    prompt: Prompt = None,
    base_model: BaseModel = None,
    force: Force = False,
) -> None:
    """Write base and adapter as one model folder. The adapter is added to the base's float weights."""
    quiet_libraries()
    from huarizo.inference.artifact import find_tuned
    from huarizo.results import model_folder as merging

    tuned = find_tuned(run, prompt, base_model)
    print(f"merged: {merging.merge(tuned, out or tuned.folder / 'merged', force, console())}")


@app.command()
def export(
    run: ResultName,
    to: Annotated[str, typer.Option(help="output format: gguf")] = "gguf",
    kind: Annotated[
        str | None, typer.Option("--type", help="type of the weights: f32, f16, bf16 or q8_0; default: f16")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="output file; default: RUN/NAME-TYPE.gguf")] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="write only the LoRA, to use with a GGUF of its base")
    ] = False,
    ollama: Annotated[bool, typer.Option("--ollama", help="also write a Modelfile for Ollama")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="load the file in llama.cpp and compare it with Transformers")
    ] = False,
    prompt: Prompt = None,
    base_model: BaseModel = None,
    force: Force = False,
) -> None:
    """Write the tuned model as one GGUF file, for llama.cpp and Ollama."""
    if to != "gguf":
        raise UserError(f"--to {to}: gguf is the only format. For a model folder: huarizo merge {run}")
    if adapter and (ollama or kind):
        raise UserError("--adapter writes the LoRA alone, in f32: --ollama and --type are for the whole model")
    kind = kind or "f16"
    quiet_libraries()
    from huarizo.inference.artifact import find_tuned
    from huarizo.results.gguf import export_adapter, export_gguf
    from huarizo.results.ollama import MODELFILE, commands, modelfile, write_modelfile
    from huarizo.results.overwrite import check_file
    from huarizo.results.verify import ADAPTERS_BASE, compare_adapter, compare_with_transformers, llama_cpp

    if verify:
        llama_cpp()  # fails early if it is missing
    tuned = find_tuned(run, prompt, base_model)
    name = (tuned.run.path if tuned.run else Path(run).expanduser()).resolve().name
    file = out or tuned.folder / f"{name}-{'adapter' if adapter else kind}.gguf"
    if ollama:
        if file.name == MODELFILE:
            raise UserError(f"{file}: this is the name of the Modelfile. Choose another")
        check_file(file.with_name(MODELFILE), force)
        modelfile(tuned, file.name)  # fails early if Ollama can't run it
    if adapter:
        export_adapter(tuned, file, force)
    else:
        export_gguf(tuned, file, kind, force, console())
    if verify:
        found = compare_adapter(tuned, file, console()) if adapter else compare_with_transformers(tuned, file)
        print(found)
        if not found.agrees(ADAPTERS_BASE if adapter else kind):
            raise ModelError(
                f"{file}: llama.cpp computes something else from this file, so don't use it. The adapter is fine; for "
                f"a model folder: huarizo merge {run}"
            )
    if ollama:
        lines = commands(file, write_modelfile(tuned, file, force))
        print("\n".join(["to run it in Ollama:", *(f"  {command}" for command in lines)]))
    print(f"exported: {file}")


@app.command()
def push(
    run: RunName,
    repository: Annotated[
        str, typer.Argument(metavar="REPO", help="hub repository: owner/name, or just a name under your account")
    ],
    merged: Annotated[bool, typer.Option("--merged", help="send the folder written by `huarizo merge`")] = False,
    gguf: Annotated[bool, typer.Option("--gguf", help="send the files written by `huarizo export`")] = False,
    public: Annotated[bool, typer.Option("--public", help="make the repository public; default: private")] = False,
    base_model: BaseModel = None,
    yes: Annotated[bool, typer.Option("--yes", help="send without asking")] = False,
    force: Force = False,
) -> None:
    """Send the adapter to the Hugging Face hub. Private by default; shows the files and the model card first."""
    if merged and gguf:
        raise UserError("--merged and --gguf need a repository each: push one after the other")
    quiet_libraries()
    from huarizo.hub.upload import account
    from huarizo.results.publish import publication, publish

    kind = "merged" if merged else "gguf" if gguf else "adapter"
    what = publication(open_run(run), repository, kind, public, base_model)
    print(what)
    if not yes:
        if not sys.stdin.isatty():
            raise UserError("nothing was sent. Check the list above, then add --yes to send it")
        print(f"it would be sent {account(repository)}")
        if not confirm("Send this?", default=False):
            print("nothing was sent")
            raise typer.Exit(Interrupted.exit_code)
    print(f"pushed: {publish(what, force)}")
