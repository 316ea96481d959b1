"""A stand-in for `os` in `huarizo.files`: it counts file operations, and kills, fails or records at any of them."""

import errno
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huarizo.files

WATCHED = ("open", "write", "fsync", "close", "replace", "unlink", "mkdir", "rmdir")


@dataclass
class Operation:
    """What `huarizo.files` asked of the system. `result` is a file descriptor or a number of bytes."""

    name: str
    args: tuple[Any, ...]
    result: Any = None


class Operations:
    """Takes the place of `os` in `huarizo.files` until `remove` is called.

    before: called with the number of the operation and the operation itself, before it is done; it may raise, or end
    the process. It may also return a number of bytes: then only that much of a write is done.
    """

    def __init__(self, before: Callable[[int, Operation], int | None] | None = None) -> None:
        self.before = before
        self.done: list[Operation] = []
        huarizo.files.os = self  # pyright: ignore

    def remove(self) -> None:
        huarizo.files.os = os

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in WATCHED:
            return real

        def watched(*args: Any, **kwargs: Any) -> Any:
            operation = Operation(name, args)
            self.done.append(operation)
            length = self.before(len(self.done), operation) if self.before else None
            if name == "write" and length is not None:
                args = (args[0], args[1][:length])
            operation.args = (args[0], bytes(args[1])) if name == "write" else args
            operation.result = real(*args, **kwargs)
            return operation.result

        return watched


def kill_at(number: int, half: bool = False) -> Callable[[int, Operation], int | None]:
    """SIGKILL before the operation of this number; with `half`, of a write the first half is done before."""

    def before(now: int, operation: Operation) -> int | None:
        if now == number:
            if half and operation.name == "write":
                os.write(operation.args[0], bytes(operation.args[1])[: len(operation.args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return None

    return before


def fail_at(
    numbers: set[int] | range, error: int = errno.EIO, inside: Path | None = None
) -> Callable[[int, Operation], None]:
    """OSError instead of these operations, where they concern a path inside a folder."""

    def before(now: int, operation: Operation) -> None:
        first = operation.args[0]
        concerned = inside is None or (isinstance(first, Path) and first.is_relative_to(inside))
        if now in numbers and operation.name != "close" and concerned:
            raise OSError(error, os.strerror(error))

    return before
