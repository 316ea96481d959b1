"""Chooses the files of a data set to read, by its configs and splits.

Input is the file names in a folder or on the hub, and the data set's card; output is the files to read and a line that
says what was chosen. If the card declares configs, it is followed; otherwise the file names decide. If the choice is
unclear, nothing is mixed: an error lists what there is and what to write.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from huarizo.errors import DataError
from huarizo.hub.data_card import CardError, Config, declared

TEXT_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
PACKINGS = (".gz", ".zst")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet", ".arrow", *(text + packing for text in TEXT_SUFFIXES for packing in PACKINGS))
NO_ROWS = (
    *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"),
    *("manifest.json", "metadata.json", "package.json", "croissant.json", "cache-*.arrow"),
)
"""Descriptions of data sets, and files that the `datasets` library keeps next to the rows."""
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
    "eval": ("eval", "evaluation", "heldout"),
}
SHARD = re.compile(r"(.+?)[-_.]\d{5}-of-\d{5}\b.*")
PART = re.compile(r"(?P<base>.+?)(?P<config>:[^\[\]:@/][^\[\]:@]*)?(?P<split>\[[^\[\]]+\])?", re.DOTALL)
MAX_SHOWN = 10


@dataclass(frozen=True)
class Part:
    """The requested part of a data set: a config and a split, "" if the name does not give one."""

    config: str = ""
    split: str = ""

    def __str__(self) -> str:
        return (f":{self.config}" if self.config else "") + (f"[{self.split}]" if self.split else "")


def split_name(name: str) -> tuple[str, Part]:
    """`name:config[split]` -> (name, part). Config and split are optional."""
    found = PART.fullmatch(name)
    if found is None:
        return name, Part()
    return found["base"], Part((found["config"] or "")[1:], (found["split"] or "")[1:-1])


@dataclass(frozen=True)
class Chosen:
    """The files of a data set to read. `note` says what was chosen, "" if there was no choice."""

    files: list[str]
    part: Part
    note: str


def suffix_of(name: str) -> str:
    """The extension in lower case: `.json`, or `.json.gz` for a compressed file."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(name).suffixes[-2:]]
    return "".join(suffixes) if suffixes and suffixes[-1] in PACKINGS else "".join(suffixes[-1:])


def are_rows(name: str) -> bool:
    """Whether a file name is that of a file of rows: a known kind, not hidden, not a description of the data set."""
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and suffix_of(name) in SUFFIXES and not any(fnmatchcase(path.name.lower(), no) for no in NO_ROWS)


def visible_files(folder: Path) -> Iterator[str]:
    """Relative names of all files below a folder, except hidden ones. Follows links, and enters each folder once.

    Raises:
        OSError: a folder can't be listed.
    """

    def stop(error: OSError) -> None:
        raise error

    entered: set[Path] = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=stop):
        place = Path(parent).resolve()
        if place in entered:
            folders.clear()
            continue
        entered.add(place)
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name).relative_to(folder).as_posix() for name in names if not name.startswith("."))


def _split_in(name: str) -> str:
    """The split that occurs in a name as a separate word, or ""."""
    for split, words in SPLITS.items():
        if any(re.search(rf"(?<![a-z]){each}(?![a-z])", name.lower()) for each in words):
            return split
    return ""


def _split_of(name: str) -> str:
    """The split that a file belongs to by its name, or ""."""
    path = PurePosixPath(name)
    shard = SHARD.fullmatch(path.name)
    if path.suffix == ".arrow" and len(path.parts) > 1:  # written by save_to_disk: the folder is the split
        return _split_in(path.parts[-2]) or path.parts[-2]
    if shard and _split_in(shard[1]):
        return next((split for split, words in SPLITS.items() if shard[1].lower() in words), shard[1])
    return next((split for part in reversed(path.parts) if (split := _split_in(part))), "")


def _config_of(name: str) -> str:
    """The folders of a file, except `data` and those that name a split."""
    path = PurePosixPath(name)
    folders = path.parts[:-2] if path.suffix == ".arrow" else path.parts[:-1]
    return "/".join(folder for folder in folders if folder.lower() != "data" and not _split_in(folder))


def choose(
    name: str, files: Iterable[str], part: Part, heldout: bool = False, published: bool = False, card: str = ""
) -> Chosen:
    """The files of a data set to read.

    Args:
        name: the data set's name, for messages.
        files: relative names, with /; files that hold no rows are ignored.
        part: the requested config and split.
        heldout: if `part` names no split, choose the one that is not for training.
        published: the data set is on the hub, where files next to each other may be different data sets.
        card: the text of its README.md.

    Raises:
        DataError: there is no such config or split, or there are several and `part` does not say which.
    """
    rows = sorted(file for file in files if are_rows(file))
    configs = _declared(name, card, part)
    if configs:
        config, splits = _declared_config(name, rows, configs, part.config)
        several = len(configs) > 1
    else:
        config, within = _choose_config(name, rows, part.config, published)
        splits, several = _splits_of(within), len(within) < len(rows)
    split, chosen, others = _choose_split(name, Part(config if several else part.config), splits, part.split, heldout)
    if published and not part.config and not configs:
        _require_one(name, chosen)
    notes = [f"config {config}"] if several else []
    notes += [f"split {split}"] if others and split else []
    notes += [f"not read: split {_shown([other or 'without a name' for other in others])}"] if others else []
    read = Part(config if several else part.config, split if others else part.split)
    return Chosen(chosen, read, f"{name}: {', '.join(notes)}" if notes else "")


def _declared(name: str, card: str, part: Part) -> dict[str, Config]:
    """The configs that the card declares; {} if it declares none, or not the requested one, which may be a file."""
    try:
        configs = declared(card)
    except CardError as error:
        if part.config:
            return {}
        raise DataError(f"{name}: {error}. Mend it, or name a file: {name}:FILE") from None
    return configs if not part.config or part.config in configs else {}


def _declared_config(
    name: str, rows: list[str], configs: dict[str, Config], wanted: str
) -> tuple[str, dict[str, list[str]]]:
    """The config's name, and its files by split."""
    defaults = [each for each, config in configs.items() if config.is_default or len(configs) == 1]
    config = wanted or (defaults[0] if len(defaults) == 1 else "")
    if not config:
        raise _several_configs(name, list(configs))
    chosen = configs[config]
    splits = chosen.files(rows) or _splits_of([file for file in rows if file.startswith(chosen.folder)])
    if not any(splits.values()):
        raise DataError(f"{name}: none of the files that README.md names for the config {config!r} is a file of rows")
    return config, {split: files for split, files in splits.items() if files}


def _several_configs(name: str, configs: Sequence[str]) -> DataError:
    named = [config for config in configs if config]
    return DataError(
        f"{name}: has several configs ({_shown(named)}), which are only mixed on request. Write {name}:{named[0]}, or "
        "a list of those that you want"
    )


def _splits_of(rows: list[str]) -> dict[str, list[str]]:
    """Split -> its files, by their names."""
    splits: dict[str, list[str]] = {}
    for file in rows:
        splits.setdefault(_split_of(file), []).append(file)
    return splits


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    return ", ".join(names[:MAX_SHOWN]).encode("unicode_escape").decode() + more


def _choose_config(name: str, rows: list[str], wanted: str, published: bool) -> tuple[str, list[str]]:
    configs: dict[str, list[str]] = {}
    for file in rows:
        configs.setdefault(_config_of(file), []).append(file)
    if wanted:
        found = configs.get(wanted) or [file for file in rows if wanted in (file, *_short_names(file))]
        if found:
            return wanted, found
        there = list(configs) if len(configs) > 1 else [PurePosixPath(file).name for file in rows]
        raise DataError(f"{name}: there is no config {wanted!r} in it. There are: {_shown([c for c in there if c])}")
    split = [config for config, files in configs.items() if all(_split_of(file) for file in files)]
    if len(configs) <= 1 or (len(split) <= 1 and not published):
        return "", rows
    if "default" in configs:
        return "default", configs["default"]
    raise _several_configs(name, list(configs))


def _short_names(file: str) -> tuple[str, str]:
    path = PurePosixPath(file)
    return path.name, path.name.removesuffix(suffix_of(file))


def _choose_split(
    name: str, part: Part, splits: dict[str, list[str]], wanted: str, heldout: bool
) -> tuple[str, list[str], list[str]]:
    """(name of the split, its files, names of the other splits)."""
    split = _wanted_split(splits, wanted) if wanted else _default_split(list(splits), heldout)
    others = [each for each in splits if each != split]
    if split is not None and split in splits:
        return split, splits[split], others
    if not splits:
        return "", [], []
    there = _shown([each for each in splits if each])
    if wanted:
        raise DataError(f"{name}: there is no split {wanted!r} in it. There are: {there or 'no splits'}")
    example = next(filter(None, others))
    raise DataError(
        f"{name}: has several splits ({there}), which are only mixed on request. Write {name}{part}[{example}], or a "
        "list of those that you want"
    )


def _wanted_split(splits: dict[str, list[str]], wanted: str) -> str | None:
    return wanted if wanted in splits else next((s for s, words in SPLITS.items() if wanted.lower() in words), None)


def _default_split(splits: list[str], heldout: bool) -> str | None:
    """The split to read if none is named; None if that is unclear."""
    if heldout and len(splits) > 1:
        rest = [split for split in splits if split and _split_in(split) != "train"]
        return rest[0] if len(rest) == 1 else None
    if "train" in splits or len(splits) == 1:
        return "train" if "train" in splits else splits[0]
    training = [split for split in splits if _split_in(split) == "train"]
    if training:
        return training[0] if len(training) == 1 else None
    return "" if "" in splits else None


def _require_one(name: str, files: list[str]) -> None:
    """Refuse files that may be different data sets: pieces of one data set differ only in numbers."""
    kinds: dict[str, str] = {}
    for file in files:
        stem = _short_names(file)[1]
        shard = SHARD.fullmatch(stem)
        kinds.setdefault(re.sub(r"[\W\d_]", "", shard[1] if shard else stem), file)
    if len(kinds) > 1:
        different = list(kinds.values())
        raise DataError(
            f"{name}: has files that may be different data sets ({_shown(different)}), which are only mixed on "
            f"request. Write {name}:{different[0]}, or a list of those that you want"
        )
