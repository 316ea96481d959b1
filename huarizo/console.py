"""What the commands write to a terminal, and keeping the libraries' own messages off it."""

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
"""Control characters but tab and line feed, and those that turn the direction of a line."""
OF_BARS = re.compile(r"\r|(?:\x1b\[A)+\Z")
"""How tqdm begins to write over a bar's line, and all that it writes to go to lines above."""
WRITER_OF_BARS = "tqdm.utils"  # the module through which tqdm writes its bars, and nothing else


class PlainConsole(Console):
    """Shows texts as they are, without markup; what they hold that would command a terminal is left out.

    Only rich's own commands, its colours and its bars, pass. When who read it has left, the command ends; with
    `outlives_reader` it goes on in silence, and `closed` says so.
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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in its buffer


def console(**settings: Any) -> PlainConsole:
    """The one console for what foreign texts may be part of; a line is as long as it is."""
    return PlainConsole(soft_wrap=True, **settings)


class PlainStream:
    """A text stream that leaves out what would command a terminal; rich writes to the stream beneath it.

    Progress bars of the hub and other libraries are tqdm's, which moves them by a few commands of its own. These pass
    where tqdm itself writes them, in front of a bar's text and not inside it.
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
    """From now on no text, whoever prints it, commands the terminal."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, PlainStream):
            setattr(sys, name, PlainStream(stream))


def program() -> str:
    """What to type to start Huarizo: its name where the shell finds it, or else its path."""
    started = Path(sys.argv[0])
    return "huarizo" if shutil.which("huarizo") or started.name != "huarizo" else os.path.relpath(started)


def without_controls(text: str) -> str:
    """A foreign text as it may reach a terminal: without the characters that would command it."""
    return CONTROLS.sub(" ", text)


def write(text: str) -> None:
    """Text as it comes, without a line's end and without what would command a terminal."""
    print(without_controls(text), end="", flush=True)


def confirm(question: str, default: bool) -> bool:
    """Ask a person. Raises KeyboardInterrupt on Ctrl-C and at the end of input."""
    try:
        return typer.confirm(without_controls(question), default=default)
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
