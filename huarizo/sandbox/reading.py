"""Reads foreign files in this process: regular files only, with a size limit.

Opening never waits for a pipe and never reads a device. Calls into native libraries can be interrupted with Ctrl-C.
"""

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
MOST_JSON = 10_000_000  # bytes of a file; parsed JSON takes up to 25 times as much memory


def open_file(path: Path) -> BufferedReader:
    """A regular file, open for reading. Never waits for a pipe, never reads a device.

    Raises:
        OSError: it can't be opened, or is not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
    raise OSError(errno.EINVAL, f"it is {kind}, not a file", str(path))


def read_bytes(path: Path, most: int = MOST_JSON) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: it can't be read, or is not a regular file.
        ValueError: it has more than `most` bytes.
    """
    with open_file(path) as file:
        content = file.read(most + 1)
        if len(content) > most:
            raise ValueError(f"{os.fstat(file.fileno()).st_size:,} bytes are too many for it")
    return content


def read_text(path: Path, most: int = MOST_JSON) -> str:
    """The UTF-8 text of a regular file, without its byte order mark.

    Raises:
        OSError: it can't be read, or is not a regular file.
        ValueError: it has more than `most` bytes, or is not UTF-8.
    """
    return read_bytes(path, most).decode("utf-8-sig")


def read_json(path: Path, most: int = MOST_JSON) -> Any:  # callers check the value against what they expect
    """The value of a JSON file.

    Raises:
        OSError: it can't be read, or is not a regular file.
        ValueError: it is too large, not UTF-8, not JSON, or nested too deeply.
    """
    try:
        return json.loads(read_bytes(path, most))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def odd_entry(folder: Path) -> str | None:
    """What is wrong with the first entry that is neither file nor folder, as opening it could hang; None if nothing."""
    for path in sorted(folder.iterdir()):
        try:
            mode = path.stat().st_mode
        except OSError as error:
            return f"{path.name} can't be read: {error.strerror or error}. Mend or remove it"
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            return f"{path.name} is a pipe or a device, not a file. Remove it"
    return None


class PanicError(ValueError):
    """A Rust library panicked."""


@contextmanager
def without_panics() -> Iterator[None]:
    """Turn a panic of a Rust library, which is a BaseException, into a PanicError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise PanicError(f"the library that reads it gives up: {error}") from None


def interruptible(call: Callable[[], T]) -> T:
    """Run a library call so that Ctrl-C works, even if native code in the library ignores signals.

    The call runs in a daemon thread; after Ctrl-C that thread is abandoned and ends with the process.

    Raises:
        PanicError: a Rust library panicked.
        Exception: whatever the call raises.
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
