"""Where a result is written: nothing that is there goes unasked, and with `--force` nothing of another kind."""

import os
from collections.abc import Sequence
from pathlib import Path

from huarizo.errors import UserError


def check_file(file: Path, force: bool, spared: Sequence[Path] = ()) -> None:
    """Can a file be written there?

    spared: folders in which nothing may be replaced.

    Raises:
        UserError: it is a folder, a device or in a spared folder, its folder is a file, or there is something already,
            and not `force`.
    """
    if file.is_dir():
        raise UserError(f"{file}: this is a folder. Name a file, such as {file / 'NAME'}")
    _check_free(file, force)
    if file.exists() and not file.is_file():
        raise UserError(f"{file}: this is a device or a pipe, which no file replaces. Name another place")
    if os.path.lexists(file) and any(file.resolve().is_relative_to(folder.resolve()) for folder in spared):
        raise UserError(f"{file}: this file is a part of the model that is read. Name another place")


def check_folder(folder: Path, force: bool, known_by: str, spared: Sequence[Path] = ()) -> None:
    """Can a new folder stand there? With `force` it may take the place of one like it, and of an empty one.

    known_by: a file that every folder of this kind has. spared: what must not go with the folder that is replaced.

    Raises:
        UserError: there is something already, and not `force`; or something that is not of this kind.
    """
    if folder.name in ("", "..") and not folder.is_dir():
        raise UserError(f"{folder}: a new folder needs a name. Name another place")
    _check_free(folder, force)
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: this is a file, and a folder is to be written. Name another place")
    place = folder.resolve()
    if Path.cwd().is_relative_to(place):
        raise UserError(f"{folder}: this is the folder that you are in, which can't be replaced. Name another place")
    held = next((path for path in spared if path.resolve().is_relative_to(place)), None)
    if held is not None:
        raise UserError(f"{folder}: {held} would be lost with this folder. Name another place")
    entries = list(folder.iterdir())
    if entries and (not (folder / known_by).is_file() or any(entry.is_dir() for entry in entries)):
        raise UserError(
            f"{folder}: more than such a result is in this folder, so --force does not replace it. Name another place, "
            "or remove it yourself"
        )


def _check_free(target: Path, force: bool) -> None:
    above = next(parent for parent in target.absolute().parents if parent.exists())
    if not above.is_dir():
        raise UserError(f"{target}: {above} is a file, so nothing can stand in it. Name another place")
    if os.path.lexists(target) and not force:
        raise UserError(f"{target}: there is something here already. Name another place, or replace it with --force")
