"""Resolves names in a recipe to local files: a hub id with an optional @revision, a local path, or `quickstart`.

The name of a model, adapter or data set becomes a `Source`: the location of its files, and the commit and digests that
identify them. The hub is asked only if the name is neither a path nor `quickstart`, so that local files work without a
network.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from huarizo.errors import DataError, HubError, ModelError, UserError
from huarizo.files import sha256_of
from huarizo.hub import data_files
from huarizo.hub.data_files import Part, choose, split_name, visible_files
from huarizo.hub.download import fetch
from huarizo.hub.quickstart import QUICKSTART, quickstart_digests, quickstart_model
from huarizo.hub.sources import ADAPTER, DATA_SET, MODEL, WHOLE, Kind, Source, card_of, hashed, naming, require_fit
from huarizo.wording import did_you_mean

QUICKSTART_DATA = Path(__file__).parents[1] / "data" / "quickstart"


def resolve_model(name: str) -> Source:
    """Find a model's folder, fetching it if it is not on this machine.

    Raises:
        HubError: no such name, no access, no network, or the download is damaged.
        ModelError: it is not a model in safetensors with its tokenizer, or it is already quantised.
        MachineError: there is no space on the disk.
    """
    if name == QUICKSTART:
        folder = quickstart_model()
        return Source(name, folder, None, quickstart_digests(folder))
    local = _local(name, MODEL)
    source = _local_model(name, local) if local else fetch(name, MODEL)
    require_fit(name, source.path, MODEL)
    return source


def resolve_adapter(name: str) -> Source:
    """Find the folder of a PEFT adapter, fetching it if it is not on this machine.

    Raises:
        HubError: no such name, no access, no network, or the download is damaged.
        ModelError: it is not an adapter in safetensors.
        MachineError: there is no space on the disk.
    """
    local = _local(name, ADAPTER)
    return hashed(name, local, None, ADAPTER) if local else fetch(name, ADAPTER)


def resolve_data(name: str, heldout: bool = False) -> Source:
    """Find a data set's file or folder, fetching it if it is not on this machine.

    name: may end in `:config[split]`, for a folder too. heldout: without a split in the name, choose one that is not
        for training; of `quickstart`, the held-out rows.

    Raises:
        HubError: no such name, no access, no network, or the download is damaged.
        DataError: the folder or repository has no data files, or several configs or splits and none is chosen.
        MachineError: there is no space on the disk.
    """
    if name == QUICKSTART:
        return _local_data(name, QUICKSTART_DATA / ("eval.json" if heldout else "train.json"), WHOLE, heldout)
    base, part = split_name(name)
    if _is_there(name):
        base, part = name, WHOLE
    local = _local(base, DATA_SET)
    if local:
        return _local_data(base, local, part, heldout)
    source = fetch(base, DATA_SET, lambda files, card: choose(base, files, part, heldout, True, card))
    return _chosen(source, choose(base, source.sha256, part, heldout, True, card_of(base, source.path)))


def _chosen(source: Source, chosen: data_files.Chosen) -> Source:
    """The source, restricted to the chosen files."""
    return replace(
        source,
        sha256={file: source.sha256[file] for file in chosen.files if file in source.sha256},
        files=tuple(source.path / file for file in chosen.files),
        part=chosen.part,
        note=chosen.note,
    )


def _is_there(name: str) -> bool:
    try:
        return bool(name) and Path(name).exists()
    except OSError:  # too long for a name
        return False


def files_of(sources: Iterable[Source]) -> list[Path]:
    """The files of data sets, in the order in which they are read."""
    return [file for source in sources for file in source.files]


def pins(sources: Sequence[Source]) -> dict[str, str]:
    """File -> hex digest, for one source or several; with several, the files are prefixed with the source's index.

    A source's location on disk is not part of the names, so that a data set may be moved.
    """
    if len(sources) == 1:
        return sources[0].sha256
    return {f"{place}/{file}": digest for place, source in enumerate(sources) for file, digest in source.sha256.items()}


def check_pinned(role: str, sources: Sequence[Source], pinned: dict[str, str]) -> None:
    """Check that the files of a model or of data sets are those that a recipe was resolved with.

    Raises:
        UserError: a file differs or is missing.
    """
    now = pins(sources)
    places = ", ".join(str(source.path) for source in sources)
    for file, digest in pinned.items():
        if now.get(file) != digest:
            raise UserError(
                f"{places}: {file} is not the file that this recipe was made with (its sha256 differs). Put the "
                f"file back, or remove pinned.{role} from the recipe to start a new run with what is there"
            )


def _local(name: str, kind: Kind) -> Path | None:
    """The local path that `name` means, or None if it is a hub id."""
    path = Path(name).expanduser() if name == "~" or name.startswith("~/") else Path(name)
    with naming(name, HubError):
        if name and path.exists():
            return path.resolve()
        beside = {entry.name for entry in path.parent.iterdir()} if path.parent.is_dir() else set()
        beside.discard(path.name)  # a broken link
    if "://" in name:
        raise HubError(f"{name}: give a hub id as `owner/name` or `owner/name@revision`, not an address")
    outside = name.startswith(("./", "../", "~", "/")) or path.is_absolute()
    if not outside and _is_hub_id(name):
        return None
    absent = f"{name}: there is no such file or folder ({path.absolute()})"
    if hint := did_you_mean(path.name, sorted(beside), lambda near: str(path.parent / near)):
        raise HubError(f"{absent}{hint}")
    if outside:
        raise HubError(f"{absent}. Check the name and the folder")
    raise HubError(
        f"{absent}, and an id on the hub has the form `owner/name` or `owner/name@revision`. "
        f"A {kind.noun} can also be `quickstart`"
    )


def _is_hub_id(name: str) -> bool:
    repo_id, at, revision = name.partition("@")
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        return False
    return "/" in repo_id and bool(revision) == bool(at)


def _local_model(name: str, path: Path) -> Source:
    if not path.is_dir():
        what = "a GGUF file, which is for running, not training" if path.suffix == ".gguf" else "a file"
        raise ModelError(f"{name} is {what}. Give the folder that holds config.json, *.safetensors and the tokenizer")
    with naming(name, ModelError):
        problem = MODEL.broken(path)
    if problem:
        raise ModelError(f"{name}: {problem}")
    return hashed(name, path, None, MODEL)


def _local_data(name: str, path: Path, part: Part, heldout: bool) -> Source:
    """The content is checked when the rows are read; pipes and devices are not opened here."""
    with naming(name, DataError):
        if not path.is_dir():
            if part != WHOLE:
                raise DataError(f"{name}: this is a file, which has no configs or splits. Leave out {part}")
            return Source(name, path, None, {path.name: sha256_of(path)} if path.is_file() else {}, (path,))
        chosen = choose(name, visible_files(path), part, heldout, card=card_of(name, path))
        files = {file: path / file for file in chosen.files}
        digests = {file: sha256_of(found) for file, found in files.items() if found.is_file()}
    return Source(name, path, None, digests, tuple(files.values()) or (path,), chosen.part, chosen.note)
