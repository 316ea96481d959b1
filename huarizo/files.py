"""Writes files and folders whole or not at all.

Everything Huarizo keeps is written under a temporary name next to its place, flushed to disk, and renamed in one step,
so no reader ever sees half a file. A killed process may leave temporary files (`.NAME.TOKEN.tmp`), which
`remove_leftovers` deletes.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypedDict

from huarizo.errors import HuarizoError, MachineError
from huarizo.sandbox.reading import open_file

Content = bytes | str | Callable[[BinaryIO], None]
"""The content of a file: bytes, text, or a function that writes it to the open file."""
MANIFEST = "manifest.json"
LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.(tmp|deleted)")
REMEDIES = {
    errno.ENOSPC: "Free some space and try again",
    errno.EDQUOT: "Free some space (your quota is used up) and try again",
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f) and try again",
    errno.EROFS: "Mount it for writing, or choose another folder",
    errno.EACCES: "Change its permissions, or choose another folder",
    errno.ENOENT: "The folder has vanished: if it is on a drive that was unmounted, mount it again",
    errno.ENOTCONN: "The drive is no longer connected: mount it again",
    errno.EIO: "The disk or drive reports an error: copy what is there to another one",
    errno.ELOOP: "It is a link, and Huarizo neither reads nor writes through links: remove it",
    errno.ENXIO: "Remove it",
}
RUST = re.compile(r"\(os error (\d+)\)")
NO_FOLDER_RENAME = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EXDEV)
"""The errors of file systems that can't rename a folder."""


class FileFacts(TypedDict):
    """What a manifest records of a file."""

    size: int
    """Bytes."""
    sha256: str


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors while writing `path` into ones that name the path, the cause and a remedy.

    Raises:
        MachineError: instead of OSError.
    """
    try:
        yield
    except OSError as error:
        raise _unwritable(path, error.errno or 0, error.strerror or str(error)) from error
    except HuarizoError:
        raise
    except Exception as error:  # libraries in Rust wrap the system's errors in their own
        match = RUST.search(str(error))
        if match is None:
            raise
        raise _unwritable(path, int(match[1]), os.strerror(int(match[1]))) from error


def _unwritable(path: Path, number: int, cause: str) -> MachineError:
    remedy = REMEDIES.get(number, "Choose another folder or disk")
    return MachineError(f"{path}: could not be written: {cause}. {remedy}")


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename inside it survives a power cut. Does nothing where unsupported."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that flush no folders
            raise
    finally:
        os.close(descriptor)


def open_own(path: Path, flags: int) -> int:
    """Open a regular file of a run folder, never through a link; returns a descriptor.

    A run folder may come from someone else. A link or a second name in place of a file could make us overwrite another
    file, and a pipe could block forever. Raises OSError.
    """
    more = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags | more, 0o644)
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and (found.st_nlink <= 1 or not flags & (os.O_WRONLY | os.O_RDWR)):
        return descriptor
    os.close(descriptor)
    kind = "the file has other names" if stat.S_ISREG(found.st_mode) else "it is no ordinary file"
    raise OSError(errno.ENXIO, kind, str(path))


def read_own(path: Path) -> bytes:
    """The content of a file of a run folder, opened with `open_own`. Raises OSError."""
    with os.fdopen(open_own(path, os.O_RDONLY), "rb") as file:
        return file.read()


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{ending}")


def _write_file(path: Path, content: Content) -> None:
    """Write and flush a new file. A failed flush is final and not retried: the kernel may have dropped the data."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        if callable(content):
            with os.fdopen(descriptor, "wb", closefd=False) as file:
                content(file)
        else:
            _write_all(descriptor, content.encode("utf-8") if isinstance(content, str) else content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: Content) -> None:
    """Write a file in one step, into an existing folder.

    Raises:
        MachineError: the disk is full or can't be written. What stood at `path` before is unchanged.
    """
    with writing(path):
        temporary = _beside(path, "tmp")
        try:
            _write_file(temporary, content)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, and flush each into its parent, so that they survive a power cut.

    Existing ones are flushed too, because the process that made them may have been killed before it did.

    Raises:
        MachineError: it can't be made.
    """
    with writing(path):
        path = path.absolute()
        above = [path, *path.parents]
        for folder in reversed(above):
            if not folder.is_dir():
                try:
                    os.mkdir(folder)
                except FileExistsError:
                    if not folder.is_dir():  # another process may have made it
                        raise
        for parent in above[1:]:
            if not os.access(parent, os.R_OK | os.W_OK):
                break  # we can't have made anything in there
            sync_folder(parent)


def make_parent(path: Path) -> None:
    """Make the parent folder of `path` if it is missing.

    Raises:
        MachineError: it can't be made.
    """
    make_folder(path.parent)


def append_line(path: Path, line: str) -> None:
    """Append a line without flushing it, for records that have a copy elsewhere. Raises OSError.

    A partial last line, left by a failed write or a killed process, is cut off first.
    """
    descriptor = open_own(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    try:
        end = _end_of_lines(descriptor)
        if end < os.fstat(descriptor).st_size:
            os.ftruncate(descriptor, end)
        try:
            _write_all(descriptor, line.encode("utf-8") + b"\n")
        except OSError:
            with suppress(OSError):  # the next call retries
                os.ftruncate(descriptor, end)
            raise
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, content: bytes) -> None:
    """Write everything, even if the system takes little at a time."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _end_of_lines(descriptor: int) -> int:
    """The offset after the last complete line."""
    end = os.fstat(descriptor).st_size
    while end > 0:
        begin = max(0, end - 4096)
        block = os.pread(descriptor, end - begin, begin)
        if (newline := block.rfind(b"\n")) >= 0:
            return begin + newline + 1
        end = begin
    return 0


def write_folder(path: Path, contents: Mapping[str, bytes]) -> None:
    """Write a new folder of files in one step, into an existing folder. The last file is the commit.

    If the file system can't rename a folder, the files are written in place, in order, and readers treat a folder
    without the last one as absent.

    Raises:
        MachineError: the disk is full or can't be written; nothing is left at `path`.
    """
    with writing(path):
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        temporary = _beside(path, "tmp")
        try:
            _fill(temporary, contents)
            try:
                os.replace(temporary, path)
            except OSError as error:
                if error.errno not in NO_FOLDER_RENAME:
                    raise
                _delete(temporary)
                temporary = path
                _fill(path, contents)
        except BaseException:
            with suppress(OSError):
                _delete(temporary)
            raise
        sync_folder(path.parent)


def _fill(folder: Path, contents: Mapping[str, bytes]) -> None:
    os.mkdir(folder)
    for name, content in contents.items():
        _write_file(folder / name, content)
    sync_folder(folder)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that is moved to `path` in one step if the block ends without an exception.

    For folders that libraries write themselves. The files inside are flushed first. An existing folder at `path` is
    replaced.

    Raises:
        MachineError: the disk is full or can't be written. What stood at `path` before is unchanged.
    """
    with writing(path):
        temporary, old = _beside(path, "tmp"), _beside(path, "deleted")
        try:
            os.mkdir(temporary)
            yield temporary
            for file in sorted(temporary.rglob("*")):
                sync_folder(file)  # a file is flushed the same way
            sync_folder(temporary)
            if path.exists():
                os.replace(path, old)
            os.replace(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            if os.path.lexists(old) and not os.path.lexists(path):
                os.replace(old, path)
            raise
        sync_folder(path.parent)
        _delete(old)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a file that a library writes. It is moved to `path` when the block ends.

    Raises:
        MachineError: the disk is full or can't be written. What stood at `path` before is unchanged.
    """
    with writing(path):
        temporary = _beside(path, "tmp")
        try:
            yield temporary
            sync_folder(temporary)  # a file is flushed the same way
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        sync_folder(path.parent)


def discard(path: Path) -> None:
    """Rename a folder and then delete it, so that its name never refers to half of it. Raises OSError."""
    hidden = _beside(path, "deleted")
    os.replace(path, hidden)
    _delete(hidden)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        for entry in sorted(os.listdir(path)):
            _delete(path / entry)
        os.rmdir(path)
    elif os.path.lexists(path):
        os.unlink(path)


def remove_leftovers(folder: Path, older_than: float = 0) -> None:
    """Remove temporary files and folders of killed processes that are older than `older_than` seconds."""
    with suppress(OSError):
        for entry in sorted(folder.iterdir()):
            if LEFTOVER.fullmatch(entry.name) and time.time() - entry.lstat().st_mtime >= older_than:
                with suppress(OSError):
                    _delete(entry)


def require_space(folder: Path, needed: int, what: str, remedy: str = "choose a folder on another disk") -> None:
    """Before work begins: are `needed` bytes free where `folder` is, or will be?

    Raises:
        MachineError: they are not; `remedy` is what helps beside freeing some.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise MachineError(
            f"{folder}: {needed / 1e6:,.0f} MB are needed for {what}, but this disk has only {free / 1e6:,.0f} MB "
            f"free. Free some space, or {remedy}"
        )


def sha256_of(path: Path) -> str:
    """The hex digest of a file, read in blocks."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, **facts: object) -> None:
    """Write manifest.json into a new folder: size and sha256 of each file, and the facts."""
    files = {f.name: {"size": f.stat().st_size, "sha256": sha256_of(f)} for f in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({**facts, "files": files}, indent=2) + "\n", encoding="utf-8")


def manifest_of(folder: Path) -> dict[str, FileFacts]:
    """Size and sha256 of each file by manifest.json; {} if there is none. Raises ValueError if it is malformed."""
    try:
        files = json.loads(read_own(folder / MANIFEST))["files"]
        return {str(name): {"size": int(file["size"]), "sha256": str(file["sha256"])} for name, file in files.items()}
    except FileNotFoundError:
        return {}
    except (OSError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} can't be read") from error


def fault_in(folder: Path, manifest: Mapping[str, FileFacts]) -> str | None:
    """Describe the first file of a folder that does not match its manifest; None if all do."""
    for name, file in manifest.items():
        try:
            if Path(name).name != name or sha256_of(folder / name) != file["sha256"]:
                return f"{name} is not as it was written"
        except OSError as error:
            return f"{name} can't be read: {error.strerror or error}"
    return None
