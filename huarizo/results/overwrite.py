"""Decides what may be replaced: nothing without `--force`, and with it only a result of the same kind."""

import os
from collections.abc import Sequence
from pathlib import Path

from huarizo.errors import UserError


def check_file(file: Path, force: bool, spared: Sequence[Path] = ()) -> None:
    """Check that a file can be written there.

    spared: folders in which nothing may be replaced.

    Raises:
        UserError: it is a folder, a device or in a spared folder, its folder is a file, or it exists and `force` is not
            set.
    """
    if file.is_dir():
        raise UserError(f"{file}: this is a folder. Name a file, such as {file / 'NAME'}")
    _check_free(file, force)
    if file.exists() and not file.is_file():
        raise UserError(f"{file}: this is a device or a pipe, which can't be replaced. Choose another path")
    if os.path.lexists(file) and any(file.resolve().is_relative_to(folder.resolve()) for folder in spared):
        raise UserError(f"{file}: this file is part of the model being exported. Choose another path")


def check_folder(folder: Path, force: bool, known_by: str, spared: Sequence[Path] = ()) -> None:
    """Check that a new folder can be written there. With `force` it may replace one of the same kind or an empty one.

    known_by: a file that every folder of this kind has. spared: paths that must not be inside a replaced folder.

    Raises:
        UserError: it exists and `force` is not set, or it is not of this kind.
    """
    if folder.name in ("", "..") and not folder.is_dir():
        raise UserError(f"{folder}: a new folder needs a name. Choose another path")
    _check_free(folder, force)
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: this is a file, but a folder is needed. Choose another path")
    place = folder.resolve()
    if Path.cwd().is_relative_to(place):
        raise UserError(f"{folder}: this is the current folder, which can't be replaced. Choose another path")
    held = next((path for path in spared if path.resolve().is_relative_to(place)), None)
    if held is not None:
        raise UserError(f"{folder}: {held} is inside and would be lost. Choose another path")
    entries = list(folder.iterdir())
    if entries and (not (folder / known_by).is_file() or any(entry.is_dir() for entry in entries)):
        raise UserError(
            f"{folder}: this folder contains more than such a result, so --force does not replace it. Choose another "
            "path, or remove it yourself"
        )


def _check_free(target: Path, force: bool) -> None:
    above = next(parent for parent in target.absolute().parents if parent.exists())
    if not above.is_dir():
        raise UserError(f"{target}: {above} is a file, not a folder. Choose another path")
    if os.path.lexists(target) and not force:
        raise UserError(f"{target}: already exists. Choose another path, or replace it with --force")
