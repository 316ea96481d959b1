"""Texts in code blocks that nothing in them can end."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from huarizo.results.report import fenced, show_summary
from huarizo.runs import Run


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("a\x1b[2J\n\tb", "```text\na [2J\n\tb\n```"),
        ("``` and ````", "`````text\n``` and ````\n`````"),
    ],
)
def test_a_block_outlasts_its_text(text: str, block: str) -> None:
    assert fenced(text) == block


@pytest.mark.parametrize(("in_gguf", "last"), [(True, "export"), (False, "merge")])
def test_only_a_command_that_works_for_the_model_is_suggested(tmp_path: Path, in_gguf: bool, last: str) -> None:
    console = Console(file=io.StringIO(), width=500)
    show_summary(console, Run(tmp_path), [], [], in_gguf)
    assert isinstance(console.file, io.StringIO)
    suggested = console.file.getvalue().partition("next:")[2]
    assert f"{last} {tmp_path}" in suggested and ("export" in suggested) == in_gguf
