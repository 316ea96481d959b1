"""Calling the commands: as a process of their own, or here, with what they print and their exit code."""

import io
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import transformers

from huarizo.commands.main import main

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


def huarizo(*arguments: str, cwd: Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own, offline."""
    command = [sys.executable, "-m", "huarizo", *arguments]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, **kwargs)


@dataclass
class Done:
    """How a command ended that was called in this process."""

    returncode: int
    stdout: str
    stderr: str


class Terminal(io.StringIO):
    """A standard input at which a person types these lines."""

    def isatty(self) -> bool:
        return True


def call(*arguments: str, cwd: Path, stdin: str | bytes | io.StringIO | None = "", encoding: str = "utf-8") -> Done:
    """The command in this process, which has loaded PyTorch already.

    stdin: what is piped to it, a stream that stands in for its standard input, or None for one that is closed.
    encoding: of standard output.
    """
    piped = stdin.encode() if isinstance(stdin, str) else stdin
    given = io.TextIOWrapper(io.BytesIO(piped), encoding="utf-8") if isinstance(piped, bytes) else piped
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=name) for name in (encoding, "utf-8"))
    code = 0
    streams = {"stdin": given, "stdout": out, "stderr": err, "argv": ["huarizo", *arguments]}
    with chdir(cwd), _libraries_as_they_were(), patch.multiple(sys, **streams):
        try:
            main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    for stream in (out, err):
        stream.seek(0)
    return Done(code, out.read(), err.read())


@contextmanager
def _libraries_as_they_were() -> Iterator[None]:
    """Undoes how a command sets warnings and logging for its process."""
    logger, verbosity = logging.getLogger("huarizo"), transformers.logging.get_verbosity()
    level = logger.level
    try:
        with warnings.catch_warnings():
            yield
    finally:
        logger.setLevel(level)
        transformers.logging.set_verbosity(verbosity)
