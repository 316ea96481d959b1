"""Reads the configs and splits that a data set's card declares: README.md, `configs:` in its front matter.

Input is the card's text; output is file patterns by config and split, as the `datasets` library understands them. The
card is foreign text: only this key is parsed, within the size limits of a recipe, and a pattern only selects from given
file names, so it can't reach any other file.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import yaml

from huarizo.recipe_file import MAX_BYTES, parse_yaml
from huarizo.sandbox.reading import read_bytes

CARD = "README.md"
LARGEST_CARD = 4_000_000  # bytes
FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
CONFIGS = re.compile(r"^configs[ \t]*:[^\n]*\n(?:(?:[ \t\-#][^\n]*)?(?:\n|\Z))*", re.MULTILINE)
SHAPE = "Each of the `configs:` is written as {config_name: ..., data_files: [{split: ..., path: ...}]}"


class CardError(ValueError):
    """The card can't be read or understood; the message says why."""


@dataclass(frozen=True)
class Config:
    """Split -> patterns of its files, below `folder`. Without splits, the file names decide."""

    splits: Mapping[str, tuple[str, ...]]
    folder: str = ""
    is_default: bool = False

    def files(self, names: Collection[str]) -> dict[str, list[str]]:
        """Split -> its files among the sorted `names` (relative, with /)."""
        there = set(names)
        found: dict[str, list[str]] = {}
        for split, patterns in self.splits.items():
            each = [f"{self.folder}{pattern.removeprefix('./')}" for pattern in patterns]
            plain = {pattern for pattern in each if pattern in there}
            globs = [pattern for pattern in each if re.search(r"[*?\[]", pattern)]
            found[split] = [name for name in names if name in plain or any(_matches(name, glob) for glob in globs)]
        return found


def card_in(folder: Path) -> str:
    """The text of the card in a folder, "" if there is none.

    Raises:
        CardError: it can't be read.
    """
    try:
        return read_bytes(folder / CARD, LARGEST_CARD).decode(errors="replace")
    except (FileNotFoundError, IsADirectoryError):
        return ""
    except (OSError, ValueError) as error:
        raise CardError(f"{CARD} can't be read: {error}") from None


def declared(card: str) -> dict[str, Config]:
    """The configs that a card declares, by name, in its order; {} if it declares none.

    Raises:
        CardError: `configs:` does not have the form that data sets use.
    """
    front = FRONT.search(card)
    block = CONFIGS.search(front[1]) if front else None
    if block is None:
        return {}
    if len(block[0]) > MAX_BYTES:
        raise CardError(f"{CARD}: {len(block[0]):,} characters of `configs:` are too many")
    try:
        values = parse_yaml(block[0])["configs"]
    except yaml.YAMLError as error:
        raise CardError(f"{CARD}: `configs:` is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, list):
        raise CardError(f"{CARD}: `configs:` is not a list. {SHAPE}")
    return dict(_config(value) for value in values)


def _config(value: object) -> tuple[str, Config]:
    if not isinstance(value, dict):
        raise CardError(f"{CARD}: {SHAPE}")
    name, files, folder = value.get("config_name", "default"), value.get("data_files"), value.get("data_dir", "")
    files = [files] if isinstance(files, str | dict) else files or []
    splits: dict[str, tuple[str, ...]] = {}
    for each in files if isinstance(files, list) else [files]:
        split, path = (each.get("split", "train"), each.get("path")) if isinstance(each, dict) else ("train", each)
        paths = path if isinstance(path, list) else [path]
        if not _are_texts([split, *paths]):
            raise CardError(f"{CARD}: {SHAPE}")
        splits[str(split)] = (*splits.get(str(split), ()), *map(str, paths))
    if not _are_texts([name, folder]):
        raise CardError(f"{CARD}: {SHAPE}")
    folder = str(folder).removeprefix("./").strip("/")
    return str(name), Config(splits, f"{folder}/" if folder else "", value.get("default") is True or name == "default")


def _are_texts(values: list[object]) -> bool:
    """Whether all values are texts, or numbers, because YAML reads a name like 2024 as a number."""
    return all(isinstance(value, str | int) and not isinstance(value, bool) for value in values)


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern matches the whole name. `**` matches any number of folders."""
    parts, reached = name.split("/"), {0}
    for wanted in pattern.split("/"):
        if wanted == "**":
            reached = set(range(min(reached), len(parts) + 1))
        else:
            reached = {at + 1 for at in reached if at < len(parts) and fnmatchcase(parts[at], wanted)}
        if not reached:
            return False
    return len(parts) in reached
