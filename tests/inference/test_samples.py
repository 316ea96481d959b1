"""Samples as they are shown on a terminal."""

import io

from rich.console import Console

from huarizo.console import PlainConsole
from huarizo.inference.samples import Sample, show_samples


def test_a_long_word_is_shown_whole() -> None:
    console = Console(width=40, file=(shown := io.StringIO()))
    show_samples(console, [Sample("0123456789" * 5, "", "가나다라마바사아자차" * 4, "abcdefghij" * 6)])
    lines = [line.split("│") for line in shown.getvalue().splitlines() if "│" in line]
    columns = ["".join(cells[place].strip() for cells in lines) for place in (1, 2, 3)]
    assert columns == ["0123456789" * 5, "가나다라마바사아자차" * 4, "abcdefghij" * 6]


def test_no_sample_commands_the_terminal() -> None:
    console = PlainConsole(width=80, file=(shown := io.StringIO()))
    show_samples(console, [Sample("\x1b[2Ja", "b\x9b2J", "c\x07", "d\x1b]0;e\n\tf")])
    assert not any(bad in shown.getvalue() for bad in "\x1b\x9b\x07") and "f" in shown.getvalue()
