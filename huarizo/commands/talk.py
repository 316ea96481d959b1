"""The commands ask and chat: one answer, or a conversation with a trained result."""

import importlib
import json
import logging
import sys
from contextlib import suppress
from typing import Annotated

import typer

from huarizo.commands.options import (
    BaseModel,
    MaxNewTokens,
    Precision,
    Prompt,
    RepetitionPenalty,
    ResultName,
    Seed,
    System,
    Temperature,
    TopK,
    TopP,
)
from huarizo.console import quiet_libraries, write
from huarizo.errors import UserError

app = typer.Typer()
LONGEST_INPUT = 1_000_000  # characters


@app.command()
def ask(
    run: ResultName,
    question: Annotated[str, typer.Argument(metavar="[PROMPT]", help="default, or -: read standard input")] = "-",
    system: System = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="print one JSON object with prompt, answer, tokens, finished")
    ] = False,
    base: Annotated[bool, typer.Option("--base", help="ask the untuned model")] = False,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    precision: Precision = "auto",
    prompt: Prompt = None,
    base_model: BaseModel = None,
) -> None:
    """Answer one prompt with a trained result."""
    quiet_libraries()
    from huarizo.data.prompts import OpenExchange
    from huarizo.inference.artifact import find_tuned
    from huarizo.inference.chat import checked
    from huarizo.inference.generate import Sampling, open_assistant, stream_answer

    sampling = checked(Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed))
    text = (_standard_input() if question == "-" else question).strip()
    if not text:
        raise UserError("the prompt is empty. Give one: huarizo ask RUN PROMPT, or on standard input")
    assistant = open_assistant(find_tuned(run, prompt, base_model), precision)
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
        raise UserError("standard input is not UTF-8 text") from None
    except OSError as error:
        raise _unreadable(error) from None
    return _bounded(text)


def _line(prompt: str) -> str:
    """Read a line of standard input, with line editing on a terminal. Raises EOFError at the end."""
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
        raise UserError(f"standard input has more than {LONGEST_INPUT:,} characters, more than any model reads at once")
    return text


@app.command()
def chat(
    run: ResultName,
    system: System = "",
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0,
    top_p: TopP = 0.95,
    top_k: TopK = 0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    precision: Precision = "auto",
    prompt: Prompt = None,
    base_model: BaseModel = None,
) -> None:
    """Chat with a trained result. /base switches to the untuned model, /help lists the other commands."""
    quiet_libraries()
    from huarizo.inference.artifact import find_tuned
    from huarizo.inference.chat import HELP, Conversation, checked, converse
    from huarizo.inference.generate import Sampling, open_assistant

    sampling = checked(Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed))
    assistant = open_assistant(find_tuned(run, prompt, base_model), precision)
    print(HELP)
    with suppress(ImportError):
        importlib.import_module("readline")  # line editing and history, if available
    converse(Conversation(assistant, write, system, sampling), _line)
