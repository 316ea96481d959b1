"""Terminal output: keeps control characters in foreign text from the terminal, and quiets the libraries."""

import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO, TypeVar

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import track
from rich.segment import Segment

T = TypeVar("T")
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Control characters except tab and line feed, and characters that change the direction of text."""
OF_BARS = re.compile(r"\r|(?:\x1b\[A)+\Z")
"""What tqdm writes to overwrite a bar's line, or to move to the lines above."""
WRITER_OF_BARS = "tqdm.utils"  # the module in which tqdm writes its bars, and only those


class PlainConsole(Console):
    """Shows text as it is, without markup, and with control characters removed.

    Only rich's own control codes pass: colours and progress bars. When the reader of standard output closes it, the
    command ends. With `outlives_reader` it continues silently instead, and `closed` is True.
    """

    def __init__(self, outlives_reader: bool = False, **settings: Any) -> None:
        super().__init__(markup=False, highlight=False, **settings)
        self.outlives_reader, self.closed = outlives_reader, False

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            plain = segment.control or not CONTROLS.search(segment.text)
            yield segment if plain else Segment(without_controls(segment.text), segment.style)

    def on_broken_pipe(self) -> None:
        if not self.outlives_reader:
            super().on_broken_pipe()
        self.closed = self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for buffered output


def console(**settings: Any) -> PlainConsole:
    """A console for output that may contain foreign text. It does not wrap lines."""
    return PlainConsole(soft_wrap=True, **settings)


class PlainStream:
    """A text stream that removes control characters. Rich bypasses it and writes to the stream beneath.

    The progress bars of the hub and other libraries are tqdm's, which moves the cursor with a few control codes. These
    pass if tqdm itself writes them, and only in front of a bar's text.
    """

    def __init__(self, stream: TextIO) -> None:
        self.rich_proxied_file = stream

    def write(self, text: str) -> int:
        is_bar = sys._getframe(1).f_globals.get("__name__") == WRITER_OF_BARS
        command = OF_BARS.match(text) if is_bar else None
        begin = command.end() if command else 0
        self.rich_proxied_file.write(text[:begin] + without_controls(text[begin:]))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


def keep_terminal_plain() -> None:
    """From now on remove control characters from all output, whoever prints it."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, PlainStream):
            setattr(sys, name, PlainStream(stream))


def program() -> str:
    """The command that starts Huarizo: its name if the shell finds it, else its path."""
    started = Path(sys.argv[0])
    return "huarizo" if shutil.which("huarizo") or started.name != "huarizo" else os.path.relpath(started)


def without_controls(text: str) -> str:
    """The text with control characters replaced by spaces, safe to print on a terminal."""
    return CONTROLS.sub(" ", text)


def write(text: str) -> None:
    """Print text at once, without a newline and without control characters."""
    print(without_controls(text), end="", flush=True)


def confirm(question: str, default: bool) -> bool:
    """Ask the user yes or no. Raises KeyboardInterrupt on Ctrl-C and at the end of input."""
    try:
        return typer.confirm(without_controls(question), default=default)
    except typer.Abort:
        print()
        raise KeyboardInterrupt from None


def tracked(items: Iterable[T], what: str, console: Console | None, total: int | None = None) -> Iterable[T]:
    """Iterate over the items, with a progress bar if the console is a terminal."""
    if console is None or not console.is_terminal:
        return items
    return track(items, what, total=total, console=console, transient=True)


def quiet_libraries() -> None:
    """Show our own messages only, none of the libraries' warnings."""
    import transformers

    quiet_torch()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def quiet_torch() -> None:
    """As `quiet_libraries`, for what uses torch only: Transformers takes a second to import."""
    warnings.filterwarnings("ignore")
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    logging.getLogger("huarizo").setLevel(logging.INFO)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "no CUDA runtime", where nvcc is
