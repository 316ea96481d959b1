"""No text, whoever prints it, commands the terminal; colours and bars of our own pass."""

import ast
import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from huarizo.console import BARS, PlainConsole, PlainStream

ROOT = Path(__file__).parents[1]
EVIL = "a\x1b[2J\x1b]0;t\x07\x9b1m\u202e\u2028\x00\x08\x7fb\tc\nd"
HARMLESS = set("\t\n")


def controls(text: str) -> set[str]:
    return {c for c in text if (ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u2028\u202e")} - HARMLESS


@pytest.mark.parametrize("shown", [EVIL, Text(EVIL), Text.assemble((EVIL, "bold"))], ids=["str", "Text", "styled"])
def test_a_console_shows_texts_without_commands(shown: str | Text) -> None:
    out = io.StringIO()
    PlainConsole(file=out, width=80).print(shown)
    table = Table(EVIL, title=EVIL)
    table.add_row(EVIL)
    PlainConsole(file=out, width=80).print(table)
    assert not controls(out.getvalue()) and "[2J" in out.getvalue()


def test_a_console_keeps_its_own_colours() -> None:
    out = io.StringIO()
    PlainConsole(file=out, force_terminal=True, color_system="standard").print(Text("green\x1b", "green"))
    assert out.getvalue() == "\x1b[32mgreen \x1b[0m\n"


def test_a_stream_lets_through_what_bars_need() -> None:
    out = io.StringIO()
    PlainStream(out, BARS).write("\r50%\x1b[A\x1b[2J\n")
    assert out.getvalue() == "\r50%\x1b[A [2J\n"
    plain = PlainStream(out)
    plain.writelines(["\r\x1b[A"])
    assert out.getvalue().endswith("  [A") and plain.getvalue() == out.getvalue()


@pytest.mark.parametrize("file", sorted((ROOT / "huarizo").rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_no_other_console_is_made(file: Path) -> None:
    called = [ast.unparse(node.func) for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    assert not {"Console", "rich.print", "typer.echo", "click.echo", "typer.secho"} & set(called)


@pytest.mark.parametrize(
    "arguments",
    [["train", "\x1b[2Jx.yaml"], ["train", "x.yaml", "\x1b[2J=1"], ["\x1b[2J"], ["train", "--\x1b[2J"], ["merge", "\x1b[2J"],
     ["train", "recipe.yaml", "data.prompt=\x9b"]],
    ids=range(6),
)  # fmt: skip
def test_errors_of_the_commands_hold_no_commands(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "recipe.yaml").write_text('"model\\e[2J": "\\e[2J"\n"\\x9b": {a: "\\e"}\n')
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from huarizo.cli import main; main()",
    ]
    done = subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr
    assert not controls(done.stdout + done.stderr)
