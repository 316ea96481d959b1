"""What the commands write to a terminal, and keeping the libraries' own messages off it."""

import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import typer
from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def console() -> Console:
    """For text that is shown as it is, without markup."""
    return Console(markup=False, highlight=False, soft_wrap=True)


def program() -> str:
    """What to type to start Huarizo: its name where the shell finds it, or else its path."""
    started = Path(sys.argv[0])
    return "huarizo" if shutil.which("huarizo") or started.name != "huarizo" else os.path.relpath(started)


CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")


def without_controls(text: str) -> str:
    """A foreign text as it may reach a terminal: without the characters that would command it."""
    return CONTROLS.sub(" ", text)


def write(text: str) -> None:
    """Text as it comes, without a line's end and without what would command a terminal."""
    print(without_controls(text), end="", flush=True)


def confirm(question: str, default: bool) -> bool:
    """Ask a person. Raises KeyboardInterrupt on Ctrl-C and at the end of input."""
    try:
        return typer.confirm(question, default=default)
    except typer.Abort:
        print()
        raise KeyboardInterrupt from None


def tracked(items: Iterable[T], what: str, console: Console | None, total: int | None = None) -> Iterable[T]:
    """The items, with a bar on the terminal that fills as they are taken; without one where there is no terminal."""
    if console is None or not console.is_terminal:
        return items
    return track(items, what, total=total, console=console, transient=True)


def quiet_libraries() -> None:
    """Our own messages only; the libraries' warnings are not the user's business."""
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    logging.getLogger("huarizo").setLevel(logging.INFO)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "no CUDA runtime", where nvcc is
