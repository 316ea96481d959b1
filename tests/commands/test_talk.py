"""What a person or a pipe gives to `ask` and `chat`."""

import errno
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from huarizo.commands import talk as commands
from huarizo.errors import UserError
from tests.commands.make import ENVIRONMENT, call


@pytest.mark.parametrize("read", [commands._standard_input, lambda: commands._line("> ")])
def test_an_input_without_end_or_that_can_not_be_read_is_reported(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/zero").open(encoding="utf-8") as endless:
        monkeypatch.setattr("sys.stdin", endless)
        with pytest.raises(UserError, match="standard input has more than"):
            read()

    class Folder(io.StringIO):
        def read(self, *_: Any) -> str:
            raise IsADirectoryError(errno.EISDIR, "Is a directory")

        readline = read

    monkeypatch.setattr("sys.stdin", Folder())
    with pytest.raises(UserError, match="standard input can't be read: Is a directory"):
        read()


def test_lines_of_a_conversation_come_from_a_pipe_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\nlast"))
    assert [commands._line("> ") for _ in range(3)] == ["one", "", "last"]
    assert capsys.readouterr().out == "> > > "
    with pytest.raises(EOFError):
        commands._line("> ")


def test_an_answer_and_a_conversation(run: Path, tmp_path: Path) -> None:
    answer = call("ask", str(run), "Count to 3", "--max-new-tokens", "5", cwd=tmp_path)
    assert answer.returncode == 0 and answer.stdout.endswith("\n"), answer.stderr
    talk = call("chat", str(run), "--max-new-tokens", "3", cwd=tmp_path, stdin="hello\n/reset\n/exit\n")
    assert talk.returncode == 0 and "you>" in talk.stdout, talk.stderr


def test_a_precision_for_the_answer(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for command in (["ask"], ["chat"], ["compare"], ["eval", "--answers", "0"]):
        done = call(*command, str(run), "--precision", "fp8", cwd=tmp_path, stdin="Hi")
        assert done.returncode == 2 and "--precision fp8: answers and losses are computed in auto, float" in done.stderr
    done = call("ask", str(run), "Hi", "--max-new-tokens", "1", "--precision", "bf16", cwd=tmp_path)
    assert done.returncode == 0 and not caplog.messages, done.stderr


def test_an_answer_as_json(run: Path, tmp_path: Path) -> None:
    command = ["ask", str(run / "adapter"), "--json", "--max-new-tokens", "2"]
    done = call(*command, cwd=tmp_path, stdin="Count to 2\n")
    assert json.loads(done.stdout).keys() == {"prompt", "answer", "tokens", "finished"}, done.stderr
    ascii = call(*command, "이름?", cwd=tmp_path, encoding="ascii")
    assert json.loads(ascii.stdout)["prompt"] == "이름?", ascii.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [("", "the prompt is empty"), (None, "the prompt is empty"), (b"Hi \xff", "not UTF-8 text")],
    ids=["empty", "closed", "no text"],
)
def test_standard_input_without_a_prompt(run: Path, tmp_path: Path, given: str | bytes | None, message: str) -> None:
    done = call("ask", str(run), cwd=tmp_path, stdin=given)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_a_process_with_its_standard_input_closed(tmp_path: Path) -> None:
    command = ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, "-m", "huarizo", "ask", "no-run"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2 and "the prompt is empty" in done.stderr
