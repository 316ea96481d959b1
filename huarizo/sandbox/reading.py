"""Foreign files that are read in this process: ordinary ones, too small to unfold into much."""

import errno
import json
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
MOST_JSON = 10_000_000  # bytes; in memory JSON takes up to 25 times that


def open_file(path: Path) -> BufferedReader:
    """An ordinary file, open for reading. A pipe is not waited for, and a device not read.

    Raises:
        OSError: it can't be opened, or is no file.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
    raise OSError(errno.EINVAL, f"it is {kind}, not a file", str(path))


def read_bytes(path: Path, most: int = MOST_JSON) -> bytes:
    """An ordinary file's content.

    Raises:
        OSError: it can't be read, or is no file.
        ValueError: it has more than `most` bytes.
    """
    with open_file(path) as file:
        content = file.read(most + 1)
        if len(content) > most:
            raise ValueError(f"{os.fstat(file.fileno()).st_size:,} bytes are too many for it")
    return content


def read_text(path: Path, most: int = MOST_JSON) -> str:
    """An ordinary file's text, without a byte order mark. Raises as `read_bytes` does, and ValueError: no UTF-8."""
    return read_bytes(path, most).decode("utf-8-sig")


def read_json(path: Path, most: int = MOST_JSON) -> Any:
    """The value of a JSON file.

    Raises:
        OSError: it can't be read, or is no file.
        ValueError: it is too large, no UTF-8, no JSON, or nested too deeply.
    """
    try:
        return json.loads(read_bytes(path, most))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def odd_entry(folder: Path) -> str | None:
    """What in a folder is neither file nor folder, so that opening it could hang; None for nothing."""
    for path in sorted(folder.iterdir()):
        try:
            mode = path.stat().st_mode
        except OSError as error:
            return f"{path.name} can't be read: {error.strerror or error}. Mend or remove it"
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            return f"{path.name} is a pipe or a device, not a file. Remove it"
    return None


class PanicError(ValueError):
    """A library in Rust gave up."""


@contextmanager
def without_panics() -> Iterator[None]:
    """A panic of a library in Rust, which is no Exception, becomes a PanicError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise PanicError(f"the library that reads it gives up: {error}") from None


def interruptible(call: Callable[[], T]) -> T:
    """What a call of a library returns, which Ctrl-C ends also where the library, deep in Rust, looks at no signal.

    It works in a thread that is left to itself then and ends with the process. Raises what the call raises; a panic
    becomes a PanicError.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with without_panics():
                results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
