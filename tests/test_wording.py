"""How messages quote what is the user's."""

import logging
from pathlib import Path

import pytest

from huarizo.wording import (
    causes_of,
    did_you_mean,
    enumerated,
    excerpt,
    excerpt_of,
    first_line,
    listed,
    printable,
    shown,
)

ROOT = Path(__file__).parents[1]


def test_quoted_texts_are_printable_and_short() -> None:
    assert printable("a\x1b[2Jb") == r"a\x1b[2Jb"
    assert shown(Path("a\nb.json")) == r"a\nb.json"
    assert excerpt("it's") == '"it\'s"'
    assert excerpt("x" * 41) == f"'{'x' * 40}'..."


def test_names_and_problems_are_cut_and_counted() -> None:
    assert enumerated([]) == "none"
    assert enumerated(["a", "b", "c"], 2) == "'a', 'b' and 1 more"
    assert listed(["a", "b"]) == "  - a\n  - b"
    assert listed(["a", "b", "c"], 2) == "  - a\n  - b\n  ... and 1 more"
    assert listed(["a", "b"], 2, 7) == "  - a\n  - b\n  ... and 5 more"


def test_a_word_that_is_nearly_known() -> None:
    assert did_you_mean("alpacca", ("alpaca", "chat")) == ". Did you mean 'alpaca'?"
    assert did_you_mean("rows.jsn", ["rows.json"], lambda name: f"data/{name}") == ". Did you mean data/rows.json?"
    assert did_you_mean("zebra", ("alpaca", "chat")) == ""
    assert did_you_mean("zebra", ()) == ""


def test_the_first_line_of_what_a_library_says(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "huarizo.wording"):
        assert first_line(ValueError("\n no such file\nadvice")) == "no such file"
    assert caplog.records[0].exc_info
    assert first_line(ValueError()) == "ValueError"


def test_the_causes_of_an_error_are_walked_once() -> None:
    inner, outer = OSError("inner"), ValueError("outer")
    outer.__cause__ = inner
    assert list(causes_of(outer)) == [outer, inner]
    inner.__context__ = outer
    assert list(causes_of(outer)) == [outer, inner]
    assert list(causes_of(None)) == []


def test_near_words_are_looked_for_in_one_place() -> None:
    found = [file for file in (ROOT / "huarizo").rglob("*.py") if "get_close_matches" in file.read_text()]
    assert found == [ROOT / "huarizo" / "wording.py"]


def test_a_quoted_value_is_short_and_without_a_token() -> None:
    assert excerpt_of(["a", 1]) == "['a', 1]"
    assert excerpt_of("x" * 100) == f"'{'x' * 56}..."
    assert excerpt_of("hf_" + "aB3" * 12) == "'hf_***'"
