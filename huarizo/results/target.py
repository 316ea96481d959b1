"""Where a result is written: nothing that is there goes unasked, and with `--force` nothing of another kind."""

import os
from collections.abc import Sequence
from pathlib import Path

from huarizo.errors import UserError


def check_file(file: Path, force: bool) -> None:
    """Can a file be written there?

    Raises:
        UserError: it is a folder, its folder is a file, or there is something already, and not `force`.
    """
    if file.is_dir():
        raise UserError(f"{file}: this is a folder. Name a file, such as {file / 'NAME'}")
    _check_free(file, force)


def check_folder(folder: Path, force: bool, known_by: str, spared: Sequence[Path] = ()) -> None:
    """Can a new folder stand there? With `force` it may take the place of one like it, and of an empty one.

    known_by: a file that every folder of this kind has. spared: what must not go with the folder that is replaced.

    Raises:
        UserError: there is something already, and not `force`; or something that is not of this kind.
    """
    _check_free(folder, force)
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: this is a file, and a folder is to be written. Name another place")
    place = folder.resolve()
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
