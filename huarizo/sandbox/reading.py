"""Foreign files that are read in this process: ordinary ones, too small to unfold into much."""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MOST_JSON = 10_000_000  # bytes; in memory JSON takes up to 25 times that


def read_bytes(path: Path, most: int = MOST_JSON) -> bytes:
    """An ordinary file's content. A pipe is not waited for, and a device not read.

    Raises:
        OSError: it can't be read.
        ValueError: it is no file, or has more than `most` bytes.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is a pipe or a device, not a file")
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{found.st_size:,} bytes are too many for it")
    return content


def read_json(path: Path, most: int = MOST_JSON) -> Any:
    """The value of a JSON file.

    Raises:
        OSError: it can't be read.
        ValueError: it is no file, too large, no UTF-8, no JSON, or nested too deeply.
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


@contextmanager
def without_panics() -> Iterator[None]:
    """A panic of a library in Rust, which is no Exception, becomes a ValueError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the library that reads it gives up: {error}") from None
