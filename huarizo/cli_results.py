"""The commands for what was trained: talk with it, compare, evaluate, merge, export, push."""

import importlib
import json
import logging
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from huarizo.console import confirm, console, quiet_libraries, write
from huarizo.errors import Interrupted, ModelError, UserError
from huarizo.runs import open_run

app = typer.Typer()
LONGEST_INPUT = 1_000_000  # characters
Name = Annotated[str, typer.Argument(metavar="RUN", help="a run, or the folder or hub id of a PEFT adapter")]
Prompt = Annotated[
    str | None, typer.Option("--prompt", metavar="FORMAT", help="prompt format, where it is not the run's: alpaca ...")
]
BaseModel = Annotated[
    str | None, typer.Option("--base-model", metavar="MODEL", help="folder or hub id of the base, where it has moved")
]
Force = Annotated[bool, typer.Option("--force", help="replace what is there")]
System = Annotated[str, typer.Option(help="a system message in front of the conversation")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="longest answer, in tokens")]
Temperature = Annotated[float, typer.Option(min=0, help="0 = the likeliest token every time")]
TopP = Annotated[float, typer.Option(help="draw from the likeliest tokens of this probability together")]
TopK = Annotated[int, typer.Option(min=0, help="draw from so many likeliest tokens; 0 = all")]
Penalty = Annotated[float, typer.Option("--repetition-penalty", help="above 1: say less twice")]
Seed = Annotated[int | None, typer.Option(help="of the draw")]


@app.command()
def ask(
    run: Name,
    question: Annotated[str, typer.Argument(metavar="[PROMPT]", help="- or nothing: read from standard input")] = "-",
    system: System = "",
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object: prompt, answer, tokens, finished")] = False,
    base: Annotated[bool, typer.Option("--base", help="the untuned model answers")] = False,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    prompt: Prompt = None,
    base_model: BaseModel = None,
) -> None:
    """Answer one prompt with a trained run."""
    quiet_libraries()
    from huarizo.data.prompts import OpenExchange
    from huarizo.results.chat import checked
    from huarizo.results.generate import Sampling, open_assistant, stream_answer
    from huarizo.results.tuned import find_tuned

    sampling = checked(Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed))
    text = (_standard_input() if question == "-" else question).strip()
    if not text:
        raise UserError("the prompt is empty. Give one: huarizo ask RUN PROMPT, or on standard input")
    assistant = open_assistant(find_tuned(run, prompt, base_model))
    if unheard := assistant.unheard(system):
        logging.getLogger(__name__).warning("%s", unheard)
    with assistant.untuned(base):
        answer = stream_answer(
            assistant, [OpenExchange(text)], (lambda _: None) if as_json else write, system, sampling
        )  # fmt: skip
    if as_json:
        facts = {"prompt": text, "answer": answer.text, "tokens": answer.tokens, "finished": answer.finished}
        print(json.dumps(facts, ensure_ascii=sys.stdout.encoding.lower() != "utf-8"))
    else:
        print()


def _standard_input() -> str:
    if sys.stdin.isatty():
        print("the prompt, then Ctrl-D:", file=sys.stderr)
    try:
        text = sys.stdin.read(LONGEST_INPUT + 1)
    except UnicodeDecodeError:
        raise UserError("standard input is not text in UTF-8") from None
    except OSError as error:
        raise _unreadable(error) from None
    return _bounded(text)


def _line(prompt: str) -> str:
    """The next line of standard input, edited on a terminal. Raises EOFError at its end."""
    try:
        if sys.stdin.isatty():
            return input(prompt)
        write(prompt)
        line = sys.stdin.readline(LONGEST_INPUT + 1)
    except OSError as error:
        raise _unreadable(error) from None
    if not line:
        raise EOFError
    return _bounded(line).removesuffix("\n")


def _unreadable(error: OSError) -> UserError:
    return UserError(f"standard input can't be read: {error.strerror or error}")


def _bounded(text: str) -> str:
    if len(text) > LONGEST_INPUT:
        raise UserError(f"standard input has more than {LONGEST_INPUT:,} characters, which no model reads at once")
    return text


@app.command()
def chat(
    run: Name,
    system: System = "",
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    prompt: Prompt = None,
    base_model: BaseModel = None,
) -> None:
    """Talk with a trained run. /base asks the untuned model, /help tells the other commands."""
    quiet_libraries()
    from huarizo.results.chat import HELP, Conversation, checked, converse
    from huarizo.results.generate import Sampling, open_assistant
    from huarizo.results.tuned import find_tuned

    sampling = checked(Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed))
    assistant = open_assistant(find_tuned(run, prompt, base_model))
    print(HELP)
    with suppress(ImportError):
        importlib.import_module("readline")  # lines can be edited and brought back, where the system has it
    converse(Conversation(assistant, write, system, sampling), _line)


def _name_and_overrides(words: list[str] | None) -> tuple[str | None, list[str]]:
    """What stands behind RUN: the name of rows or prompts, and `data.KEY=VALUE` for how they are read."""
    overrides = [word for word in words or [] if word.startswith("data.") and "=" in word]
    names = [word for word in words or [] if word not in overrides]
    if len(names) > 1:
        raise UserError(f"{names[1]}: one file, folder or hub id can be named, and then data.KEY=VALUE")
    return (names[0] if names else None), overrides


@app.command()
def compare(
    run: Name,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROMPTS] [KEY=VALUE]...", help="text, one a line, or rows; default: the run's"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="also write a file: .md, .html or .jsonl")] = None,
    max_new_tokens: MaxNewTokens = 200,
    prompt: Prompt = None,
    base_model: BaseModel = None,
    force: Force = False,
) -> None:
    """Show the answers of the base and of the tuned model side by side."""
    quiet_libraries()
    from huarizo.results import compare as comparing
    from huarizo.results.generate import open_assistant
    from huarizo.results.report import show_samples
    from huarizo.results.tuned import find_tuned, read_otherwise

    if out:
        comparing.check_target(out, force)
    file, overrides = _name_and_overrides(prompts)
    tuned = read_otherwise(find_tuned(run, prompt, base_model), overrides)
    asked = comparing.read_prompts(Path(file), tuned.recipe.data) if file else comparing.usual_prompts(tuned)
    samples = comparing.compare(open_assistant(tuned), asked, max_new_tokens, console())
    if out:
        comparing.write_comparison(samples, f"{run}: base and tuned", out, force)
    show_samples(console(), samples)
    if out:
        print(f"compared: {out}")


@app.command("eval")
def evaluate(
    run: Name,
    data: Annotated[
        list[str] | None,
        typer.Argument(metavar="[DATA] [KEY=VALUE]...", help="rows: file, folder or hub id; default: those held out"),
    ] = None,
    to_answer: Annotated[int, typer.Option("--answers", min=0, help="so many rows are also answered")] = 32,
    precision: Annotated[str | None, typer.Option(help="bf16 | fp16 | fp32; default: the fastest float")] = None,
    out: Annotated[Path | None, typer.Option(help="folder; default RUN/evaluations/TIME")] = None,
    harness: Annotated[
        str | None, typer.Option(metavar="TASKS", help="tasks of lm-eval instead, with commas between")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="questions of each lm-eval task")] = None,
    prompt: Prompt = None,
    base_model: BaseModel = None,
    force: Force = False,
) -> None:
    """Measure loss, perplexity, answers and forgetting, before and after."""
    quiet_libraries()
    from huarizo.results import evaluate as evaluating
    from huarizo.results.generate import open_assistant
    from huarizo.results.target import check_folder
    from huarizo.results.tuned import find_tuned, read_otherwise

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
    run: Name,
    out: Annotated[Path | None, typer.Argument(metavar="[OUT]", help="folder; default RUN/merged")] = None,
    prompt: Prompt = None,
    base_model: BaseModel = None,
    force: Force = False,
) -> None:
    """Add the adapter to the base's float weights and save an ordinary model folder."""
    quiet_libraries()
    from huarizo.results import merge as merging
    from huarizo.results.tuned import find_tuned

    tuned = find_tuned(run, prompt, base_model)
    print(f"merged: {merging.merge(tuned, out or tuned.folder / 'merged', force, console())}")


@app.command()
def export(
    run: Name,
    to: Annotated[str, typer.Option(help="the format: gguf")] = "gguf",
    kind: Annotated[
        str | None, typer.Option("--type", help="of the weights: f32, f16, bf16 or q8_0; default f16")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="file; default RUN/NAME-TYPE.gguf")] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="the LoRA alone, for a GGUF of its base")] = False,
    ollama: Annotated[bool, typer.Option("--ollama", help="also write a Modelfile for Ollama beside it")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="load it in llama.cpp and compare with Transformers")
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
    from huarizo.results.gguf import export_adapter, export_gguf
    from huarizo.results.ollama import MODELFILE, commands, modelfile, write_modelfile
    from huarizo.results.target import check_file
    from huarizo.results.tuned import find_tuned
    from huarizo.results.verify import ADAPTERS_BASE, compare_adapter, compare_with_transformers, llama_cpp

    if verify:
        llama_cpp()  # says that it is missing before the long work
    tuned = find_tuned(run, prompt, base_model)
    name = (tuned.run.path if tuned.run else Path(run).expanduser()).resolve().name
    file = out or tuned.folder / f"{name}-{'adapter' if adapter else kind}.gguf"
    if ollama:
        if file.name == MODELFILE:
            raise UserError(f"{file}: the Modelfile itself has this name. Name another file")
        check_file(file.with_name(MODELFILE), force)
        modelfile(tuned, file.name)  # says what Ollama can't have before the long work
    if adapter:
        export_adapter(tuned, file, force)
    else:
        export_gguf(tuned, file, kind, force, console())
    if verify:
        found = compare_adapter(tuned, file, console()) if adapter else compare_with_transformers(tuned, file)
        print(found)
        if not found.agrees(ADAPTERS_BASE if adapter else kind):
            raise ModelError(
                f"{file}: in llama.cpp this is not the trained model, so don't use the file. The adapter is sound; for "
                f"a model folder: huarizo merge {run}"
            )
    if ollama:
        told = commands(file, write_modelfile(tuned, file, force))
        print("\n".join(["to run it in Ollama:", *(f"  {command}" for command in told)]))
    print(f"exported: {file}")


@app.command()
def push(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run folder, or its name under runs/")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="on the hub: owner/name, or a name of your own")],
    merged: Annotated[bool, typer.Option("--merged", help="the folder that `huarizo merge` made")] = False,
    gguf: Annotated[bool, typer.Option("--gguf", help="the files that `huarizo export` made")] = False,
    public: Annotated[bool, typer.Option("--public", help="for everybody to see; otherwise for you alone")] = False,
    base_model: BaseModel = None,
    yes: Annotated[bool, typer.Option("--yes", help="send without asking")] = False,
    force: Force = False,
) -> None:
    """Send the adapter to the Hugging Face hub, with a model card; private, and shown first."""
    if merged and gguf:
        raise UserError("--merged and --gguf are two repositories: push one after the other")
    quiet_libraries()
    from huarizo.hub.upload import account
    from huarizo.results.publish import publication, publish

    kind = "merged" if merged else "gguf" if gguf else "adapter"
    what = publication(open_run(run), repository, kind, public, base_model)
    print(what)
    if not yes:
        if not sys.stdin.isatty():
            raise UserError("nothing was sent. Look at the list above, and say --yes to send it")
        print(f"it would go {account(repository)}")
        if not confirm("Send this?", default=False):
            print("nothing was sent")
            raise typer.Exit(Interrupted.exit_code)
    print(f"pushed: {publish(what, force)}")
