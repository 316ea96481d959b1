"""Files and folders that appear whole or not at all.

Everything Huarizo keeps is first written beside its place, flushed to the disk, and then renamed there in one step, so
that a reader, another process or the next run never meets half a file.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from huarizo.errors import MachineError


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename inside it survives a power cut. Does nothing where that can't be."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Makes the parent folder, flushes it when the block has put `path` there, and tells what the disk refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
        sync_folder(path.parent)
    except OSError as error:
        raise MachineError(
            f"{path}: could not be written: {error.strerror or error}. Free some space and try again"
        ) from error


def write_whole(path: Path, write: Callable[[BinaryIO], None] | bytes | str) -> None:
    """Write a file in one step: `write` is its content, or is called with the open binary file.

    Raises:
        MachineError: the disk is full or can't be written. What stood at `path` before is unchanged.
    """
    with _writing(path):
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                if callable(write):
                    write(file)
                else:
                    file.write(write.encode("utf-8") if isinstance(write, str) else write)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `path` in one step when the block ends without an exception.

    Files written inside are flushed first. A folder that already stands at `path` is replaced.

    Raises:
        MachineError: the disk is full or can't be written. What stood at `path` before is unchanged.
    """
    with _writing(path):
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield temporary
            for file in sorted(temporary.rglob("*")):
                if file.is_file():
                    with file.open("rb") as handle:
                        os.fsync(handle.fileno())
                else:
                    sync_folder(file)
            temporary.chmod(0o755)
            sync_folder(temporary)
            if path.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
                path.replace(old / path.name)
                temporary.replace(path)
                shutil.rmtree(old)
            else:
                temporary.replace(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
