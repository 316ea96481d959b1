"""No text, whoever prints it, commands the terminal; colours and bars of our own pass."""

import ast
import io
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.table import Table
from rich.text import Text
from tqdm import tqdm as bars

from huarizo.console import PlainConsole, PlainStream, confirm, write

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
    stream = PlainStream(out)
    outer, inner = (bars(total=2, file=stream, position=position, ascii=True, mininterval=0) for position in (0, 1))
    for bar in (inner, outer):
        bar.update()
        bar.close()
    assert "\r 50%|" in out.getvalue() and "\x1b[A" in out.getvalue()


@pytest.mark.parametrize("text", ["\r", "\rfoo", "\x1b[A", "\x1b[A\x1b[A", "a\r\x1b[A", EVIL])
def test_nothing_else_moves_on_the_terminal(text: str) -> None:
    out = io.StringIO()
    stream = PlainStream(out)
    print(text, file=stream)
    stream.writelines([text])
    logging.StreamHandler(stream).emit(logging.makeLogRecord({"msg": text}))
    bars.write(text, file=stream)
    assert not controls(out.getvalue()) and stream.getvalue() == out.getvalue()
    bars(total=2, file=stream, desc=f"a{text}", ascii=True).close()
    assert controls(out.getvalue()) == {"\r"} and "\ra" in out.getvalue()
    assert not controls(out.getvalue().replace("\ra", ""))


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
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from huarizo.commands.main import main; main()",
    ]
    done = subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr
    assert not controls(done.stdout + done.stderr)


def test_no_answer_commands_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    write("a\x1b[2Jb\x9b2Jc\x07d\re\x00f\x7fg\u2028h\n\ti 안녕 🦙")
    assert capsys.readouterr().out == "a [2Jb 2Jc d e f g h\n\ti 안녕 🦙"


def test_ctrl_c_and_the_end_of_input_answer_no_question(monkeypatch: pytest.MonkeyPatch) -> None:
    def abort(*_: Any, **__: Any) -> bool:
        raise typer.Abort

    monkeypatch.setattr(typer, "confirm", abort)
    with pytest.raises(KeyboardInterrupt):
        confirm("Send this?", default=False)
