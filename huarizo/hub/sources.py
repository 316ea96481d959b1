"""`Source`: a model, adapter or data set whose files are on this machine, and the `Kind` of each.

A kind defines which files are used, and finds what is wrong with a set of files. Only listed files are ever used, never
code or pickles.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub.utils import filter_repo_objects

from huarizo.errors import DataError, ModelError, UserError
from huarizo.files import sha256_of
from huarizo.hub import data_files, model_files, model_types
from huarizo.hub.data_card import CardError, card_in
from huarizo.hub.data_files import Part, split_name
from huarizo.hub.quickstart import QUICKSTART
from huarizo.sandbox.reading import read_json

WHOLE = Part()


@dataclass(frozen=True)
class Source:
    """A model, adapter or data set whose files are on this machine."""

    name: str
    """As in the recipe."""
    path: Path
    """The folder, or the named file."""
    revision: str | None
    """The commit hash, if it is from the hub."""
    sha256: dict[str, str]
    """File -> hex digest, for the files to use. Names are relative to `path`, or its own name if it is a file."""
    files: tuple[Path, ...] = ()
    """A data set's files, in the order in which they are read."""
    part: Part = WHOLE
    """The config and split, of a data set that has several."""
    note: str = ""
    """A message about what was chosen of several configs or splits."""

    @property
    def pinned(self) -> str:
        """The name that identifies this source exactly: `id@commit`, an absolute path, or `quickstart`.

        A data set's config and split follow: `id@commit:config[split]`.
        """
        if self.revision:
            return f"{split_name(self.name)[0].partition('@')[0]}@{self.revision}{self.part}"
        return QUICKSTART if self.name == QUICKSTART else f"{self.path}{self.part}"

    @property
    def reference(self) -> str:
        """The name for other tools: the hub id or the absolute path."""
        return split_name(self.name)[0].partition("@")[0] if self.revision else str(self.path)


@dataclass(frozen=True)
class Kind:
    """What differs between models, adapters and data sets: the files to use, and the checks of a set of files."""

    repo_type: Literal["model", "dataset"]
    noun: str
    files: tuple[str, ...]
    except_files: tuple[str, ...]
    error: type[UserError]
    lacking: Callable[[Iterable[str]], str | None]
    broken: Callable[[Path], str | None]
    beside: tuple[str, ...] = ()
    """Patterns of files that are fetched as well, but not used."""
    unfit: Callable[[Path, str], str | None] = lambda folder, name: None
    """(folder, the user's name) -> what rules the folder out, with the remedy, from the files in `first` alone."""
    first: tuple[str, ...] = ()

    def used(self, names: Iterable[str]) -> list[str]:
        """The used files among `names` (relative, with /)."""
        used = filter_repo_objects(names, allow_patterns=list(self.files), ignore_patterns=list(self.except_files))
        return sorted(used)

    def used_in(self, folder: Path) -> list[str]:
        return self.used(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def _no_data(names: Iterable[str]) -> str | None:
    return None if DATA_SET.used(names) else f"it has no data file ({', '.join(DATA_SET.files)})"


def _no_adapter(names: Iterable[str]) -> str | None:
    missing = sorted(set(ADAPTER.files) - set(names))
    return f"this is not a PEFT LoRA adapter: {' and '.join(missing)} missing" if missing else None


def _unfit_model(folder: Path, name: str) -> str | None:
    """Why a model can't be trained, from its config.json and card alone."""
    file = folder / "config.json"
    if not file.is_file():
        return None  # reported where it is looked for
    if problem := model_files.names_code(file) or model_files.quantised(folder, name):
        return problem
    try:
        return model_types.unsuitable(read_json(file))
    except (OSError, ValueError):
        return None  # reported where it is read


MODEL = Kind(
    repo_type="model",
    noun="model",
    files=model_files.FILES,
    except_files=model_files.EXCEPT_FILES,
    error=ModelError,
    lacking=model_files.lacking,
    broken=model_files.broken,
    beside=model_files.BESIDE,
    unfit=_unfit_model,
    first=("config.json", model_files.CARD),
)
ADAPTER = Kind(
    repo_type="model",
    noun="adapter",
    files=("adapter_config.json", "adapter_model.safetensors"),
    except_files=("*/*",),
    error=ModelError,
    lacking=_no_adapter,
    broken=lambda folder: _no_adapter(file.name for file in folder.iterdir()),
    beside=model_files.TEMPLATES,
)
DATA_SET = Kind(
    repo_type="dataset",
    noun="data set",
    files=tuple(f"*{suffix}" for suffix in data_files.SUFFIXES),
    except_files=(*data_files.NO_ROWS, *(f"*/{file}" for file in data_files.NO_ROWS), ".*", "*/.*"),
    error=DataError,
    lacking=_no_data,
    broken=lambda folder: _no_data(DATA_SET.used_in(folder)),
)


def hashed(name: str, folder: Path, revision: str | None, kind: Kind) -> Source:
    """The source of a folder, with the digests of its files. revision: the commit, if it is from the hub.

    Raises:
        UserError: a file can't be read; the error is of the kind's type.
    """
    with naming(name, kind.error):
        return Source(name, folder, revision, {file: sha256_of(folder / file) for file in kind.used_in(folder)})


def require_fit(name: str, folder: Path, kind: Kind) -> None:
    """Raise the kind's error if its `first` files rule this folder out."""
    if problem := kind.unfit(folder, name):
        raise kind.error(f"{name}: {problem}")


def card_of(name: str, folder: Path) -> str:
    """The text of a data set's card, "" if there is none.

    Raises:
        DataError: it can't be read.
    """
    try:
        return card_in(folder)
    except CardError as error:
        raise DataError(f"{name}: {error}. Fix or remove it") from None


@contextmanager
def naming(name: str, error_type: type[UserError]) -> Iterator[None]:
    """Inside the block files of a source are read: an OSError becomes an `error_type` that names the source."""
    try:
        yield
    except OSError as error:
        raise error_type(f"{name}: {error.filename or name} can't be read: {error.strerror or error}") from error
