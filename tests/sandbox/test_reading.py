"""Foreign files and libraries in this process: no pipe is waited for, and Ctrl-C ends what looks at no signal."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from huarizo.sandbox.reading import interruptible, open_file, read_bytes, read_json, read_text

ROOT = Path(__file__).parents[2]
PLACES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pipe": (os.mkfifo, "it is a pipe or a device"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "it is a pipe or a device"),
    "folder": (Path.mkdir, "it is a folder"),
    "nothing": (lambda path: None, "No such file"),
}


@pytest.mark.parametrize("read", [open_file, read_bytes, read_text, read_json])
@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_file_is_reported_at_once(tmp_path: Path, place: str, read: Callable[[Path], Any]) -> None:
    make, said = PLACES[place]
    make(tmp_path / "a")
    with pytest.raises(OSError, match=said):
        read(tmp_path / "a")


class PanicException(BaseException):
    """As libraries in Rust raise it, by its name alone."""


def test_a_call_gives_its_result_and_its_error() -> None:
    assert interruptible(lambda: 3) == 3

    def fail(error: BaseException) -> None:
        raise error

    with pytest.raises(KeyError, match="3"):
        interruptible(lambda: fail(KeyError(3)))
    with pytest.raises(ValueError, match="gives up: no such index"):
        interruptible(lambda: fail(PanicException("no such index")))
    assert interruptible(threading.current_thread).daemon


def test_ctrl_c_ends_a_call_that_looks_at_no_signal() -> None:
    code = (
        "import ctypes, threading\n"
        "from huarizo.sandbox.reading import interruptible\n"
        "sleep = ctypes.CDLL(None).sleep\n"
        "def without_end():\n"
        "    print('started', flush=True)\n"
        "    while True: sleep(60)\n"
        "try:\n"
        "    interruptible(without_end)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted', flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[0] == "interrupted\n"
        assert process.returncode == 0
