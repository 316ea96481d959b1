"""Finds the data files behind a path, and refuses what can't be one.

Input is a file or a folder; output is its data files, in a fixed order. Pipes, devices and unknown kinds are refused
before anything is read from them. The other steps refuse files with the helpers defined here.
"""

import shlex
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from huarizo.errors import DataError
from huarizo.hub.data_card import card_in
from huarizo.hub.data_files import PACKINGS, TEXT_SUFFIXES, Part, choose, visible_files
from huarizo.wording import did_you_mean, enumerated, shown

PACKED_SUFFIXES = (".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".tar", ".7z", ".rar")
KNOWN = f"{', '.join(TEXT_SUFFIXES)} (also with {' or '.join(PACKINGS)} after it), .parquet, .arrow"
SHEET_SUFFIXES = (".xlsx", ".xls", ".ods", ".numbers")


def refusal(path: Path, what: str, remedy: str) -> DataError:
    return DataError(f"{shown(path)}: {what}. {remedy}.")


@contextmanager
def errors_named(path: Path) -> Iterator[None]:
    """Around what reads `path`: an error of the system becomes a DataError that names path, cause and remedy."""
    try:
        yield
    except FileNotFoundError:
        raise _absent(path) from None
    except PermissionError:
        raise refusal(path, "may not be read by this user", f"Allow it: chmod u+r {shlex.quote(shown(path))}") from None
    except (OSError, ValueError) as error:
        what = getattr(error, "strerror", None) or str(error)
        raise refusal(path, f"can't be read: {what}", "Check the name and the disk, or copy it elsewhere") from None


def _absent(path: Path) -> DataError:
    if path.is_symlink():
        return refusal(path, "is a link to a file that does not exist", "Mend the link, or name the file itself")
    try:
        beside = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        beside = []
    hint = did_you_mean(path.name, beside, lambda name: shown(path.parent / name)) or ". Check the name and the folder."
    return DataError(f"{shown(path)}: does not exist{hint}")


def _is_folder(path: Path) -> bool:
    """Whether a path is a folder. Refuses, unread, what is neither a folder nor a regular file."""
    with errors_named(path):
        mode = path.stat().st_mode
    if stat.S_ISDIR(mode) or stat.S_ISREG(mode):
        return stat.S_ISDIR(mode)
    kind = "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
    raise refusal(path, f"is {kind}, not a file", "Write the rows to a file first, and name that")


def data_files(path: Path) -> list[Path]:
    """The data files behind a path: the file itself, or those of a folder, sorted by name.

    If the folder has several splits, only the files of its training split.

    Raises:
        DataError: there is no such path, it is a pipe or a device, the folder has no data file, or it has several
            configs or splits and it is unclear which one is meant.
    """
    if not _is_folder(path):
        return [path]
    with errors_named(path):
        found = sorted(visible_files(path))
        card = card_in(path)
    files = [path / file for file in choose(shown(path), found, Part(), card=card).files]
    if not files:
        names = [PurePosixPath(file).name for file in found]
        others = f" (only {enumerated(names, 5)})" if found else ""
        remedy = f"Put {KNOWN} files there"
        if any(name.lower().endswith(PACKED_SUFFIXES) for name in names):
            remedy = "Unpack the archive first"
        raise refusal(path, f"is a folder without data files{others}", remedy)
    for file in files:
        _is_folder(file)
    return files


def check_columns_differ(path: Path, names: Sequence[str]) -> None:
    """Refuse a table with two columns of the same name."""
    twice = [name for name, count in Counter(names).items() if name and count > 1]
    if twice:
        raise refusal(
            path, f"has several columns of the same name: {enumerated(twice)}", "Rename or delete all but one"
        )


def unknown_kind(path: Path) -> DataError:
    """The error for a file whose extension is not that of a data file."""
    suffix = path.suffix.lower()
    if suffix in PACKED_SUFFIXES:
        return refusal(path, f"is packed ({suffix})", f"Unpack it first; Huarizo reads {KNOWN}")
    if suffix in SHEET_SUFFIXES:
        return refusal(path, f"is a spreadsheet ({suffix})", f"Save it as CSV (UTF-8); Huarizo reads {KNOWN}")
    what = f"has an unknown extension ({suffix})" if suffix else "has no extension"
    return refusal(path, what, f"Huarizo reads {KNOWN}; rename it if it is one of these, or convert it")
