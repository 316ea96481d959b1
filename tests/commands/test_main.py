"""All commands in one: what an error becomes, and outputs that nobody takes."""

import subprocess
import sys
from pathlib import Path

import pytest

from huarizo.commands import main as cli
from huarizo.runs import find_run
from tests.commands.make import ENVIRONMENT


@pytest.mark.parametrize(("redirection", "code"), [("> /dev/full", 3), (">&-", 0), ("| true", 0)])
def test_a_short_output_that_nobody_takes(tmp_path: Path, redirection: str, code: int) -> None:
    command = f"'{sys.executable}' -m huarizo recipe {redirection}"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == code and len(done.stderr.splitlines()) == (code == 3), done.stderr


def test_a_name_that_no_file_can_have_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "keep_terminal_plain", lambda: None)
    monkeypatch.setattr(cli, "app", lambda: find_run("x" * 300))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and "too long for a file" in capsys.readouterr().err
