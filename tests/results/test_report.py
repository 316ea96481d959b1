"""Texts in code blocks that nothing in them can end."""

import pytest

from huarizo.results.report import fenced


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("a\x1b[2J\n\tb", "```text\na [2J\n\tb\n```"),
        ("``` and ````", "`````text\n``` and ````\n`````"),
    ],
)
def test_a_block_outlasts_its_text(text: str, block: str) -> None:
    assert fenced(text) == block
