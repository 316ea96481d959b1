"""Names in a recipe -> local files: a hub id with an optional @revision, a local folder or file, or `quickstart`.

In goes the name of a model or data set, out comes a `Source`: where its files lie, and the commit and digests by which
the same files are found again. Only listed kinds of files are fetched, never code or pickles, and a token is looked
for, checked and sent only where the hub is asked, because with local files everything has to work without a network.
"""

import difflib
import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import (
    HfApi,
    constants,
    hf_hub_download,
    is_offline_mode,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.hf_api import DatasetInfo, ModelInfo, RepoSibling
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

from huarizo.errors import DataError, HubError, ModelError, UserError
from huarizo.files import sha256_of
from huarizo.hub import data_files, model_files
from huarizo.hub.access import (
    FAILURES,
    Login,
    Repository,
    check_access,
    check_space,
    explain,
    explain_download,
    log_in,
    reason,
    unreachable,
)
from huarizo.hub.data_card import CARD, LARGEST_CARD, CardError, card_in
from huarizo.hub.data_files import Part, choose, split_name, visible_files
from huarizo.hub.quickstart import quickstart_digests, quickstart_model

logger = logging.getLogger(__name__)

QUICKSTART = "quickstart"
QUICKSTART_DATA = Path(__file__).parents[1] / "data" / "quickstart"
COMMIT = re.compile(r"[0-9a-f]{40}")
SHA1_OR_SHA256 = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
TIMEOUT = 20.0  # seconds, for the hub's list of files


WHOLE = Part()


@dataclass(frozen=True)
class Source:
    """A model or data set whose files are on this machine."""

    name: str
    """As the recipe says it."""
    path: Path
    """Folder, or the one file that was named."""
    revision: str | None
    """Commit hash of what came from the hub."""
    sha256: dict[str, str]
    """Files to use -> hex digest; names are relative to `path`, or are `path`'s own name where it is a file."""
    files: tuple[Path, ...] = ()
    """A data set's files of rows, in the order in which they are read."""
    part: Part = WHOLE
    """The config and split of a data set that has several."""
    note: str = ""
    """What was chosen of several configs or splits."""

    @property
    def pinned(self) -> str:
        """The name by which exactly this is found again: `id@commit`, an absolute path, or `quickstart`.

        A data set's config and split follow: `id@commit:config[split]`.
        """
        if self.revision:
            return f"{split_name(self.name)[0].partition('@')[0]}@{self.revision}{self.part}"
        return QUICKSTART if self.name == QUICKSTART else f"{self.path}{self.part}"

    @property
    def reference(self) -> str:
        """What other tools load it by: the hub id, or the absolute path."""
        return split_name(self.name)[0].partition("@")[0] if self.revision else str(self.path)


@dataclass(frozen=True)
class _Kind:
    """What differs between models and data sets: the files that are used, and what is wrong with a set of them."""

    repo_type: Literal["model", "dataset"]
    noun: str
    files: tuple[str, ...]
    except_files: tuple[str, ...]
    error: type[UserError]
    lacking: Callable[[Iterable[str]], str | None]
    broken: Callable[[Path], str | None]
    beside: tuple[str, ...] = ()
    """Patterns of files that are fetched too, and not used."""
    unfit: Callable[[Path, str], str | None] = lambda folder, name: None
    """What rules a folder out, with the remedy, by the files in `first` alone; `name` is the user's."""
    first: tuple[str, ...] = ()

    def used(self, names: Iterable[str]) -> list[str]:
        """Those of `names` (relative, with /) that are used."""
        kept = filter_repo_objects(names, allow_patterns=list(self.files), ignore_patterns=list(self.except_files))
        return sorted(kept)

    def used_in(self, folder: Path) -> list[str]:
        return self.used(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def _no_data(names: Iterable[str]) -> str | None:
    return None if DATA_SET.used(names) else f"there is no data file in it ({', '.join(DATA_SET.files)})"


def _no_adapter(names: Iterable[str]) -> str | None:
    missing = sorted(set(ADAPTER.files) - set(names))
    return f"this is no LoRA adapter of PEFT: {' and '.join(missing)} not there" if missing else None


MODEL = _Kind(
    repo_type="model",
    noun="model",
    files=model_files.FILES,
    except_files=model_files.EXCEPT_FILES,
    error=ModelError,
    lacking=model_files.lacking,
    broken=model_files.broken,
    beside=model_files.BESIDE,
    unfit=model_files.quantised,
    first=("config.json", model_files.CARD),
)
ADAPTER = _Kind(
    repo_type="model",
    noun="adapter",
    files=("adapter_config.json", "adapter_model.safetensors"),
    except_files=("*/*",),
    error=ModelError,
    lacking=_no_adapter,
    broken=lambda folder: _no_adapter(file.name for file in folder.iterdir()),
    beside=model_files.TEMPLATES,
)
DATA_SET = _Kind(
    repo_type="dataset",
    noun="data set",
    files=tuple(f"*{suffix}" for suffix in data_files.SUFFIXES),
    except_files=(*data_files.NO_ROWS, *(f"*/{file}" for file in data_files.NO_ROWS), ".*", "*/.*"),
    error=DataError,
    lacking=_no_data,
    broken=lambda folder: _no_data(DATA_SET.used_in(folder)),
)


def resolve_model(name: str) -> Source:
    """Find a model's folder, fetching it where it is not on this machine.

    Raises:
        HubError: no such name, no access, no network, or damaged on the way.
        ModelError: not a model in safetensors with its tokenizer, or one that is quantised already.
        MachineError: no space on the disk.
    """
    if name == QUICKSTART:
        folder = quickstart_model()
        return Source(name, folder, None, quickstart_digests(folder))
    local = _local(name, MODEL)
    source = _local_model(name, local) if local else _from_hub(name, MODEL)
    _require_fit(name, source.path, MODEL)
    return source


def resolve_adapter(name: str) -> Source:
    """Find the folder of a PEFT adapter that the hub has, fetching it where it is not on this machine.

    Raises:
        HubError: no such name, no access, no network, or damaged on the way.
        ModelError: no adapter in safetensors.
        MachineError: no space on the disk.
    """
    local = _local(name, ADAPTER)
    return _hashed(name, local, None, ADAPTER) if local else _from_hub(name, ADAPTER)


def resolve_data(name: str, heldout: bool = False) -> Source:
    """Find a data set: its file, or the folder of its files, fetching it where it is not on this machine.

    name: may end in `:config[split]`, of a folder too; `heldout` asks for rows that are not for training where the
        name says no split, and for the held-out rows of `quickstart`.

    Raises:
        HubError: no such name, no access, no network, or damaged on the way.
        DataError: a folder or repository without files of rows, or with several configs or splits and none chosen.
        MachineError: no space on the disk.
    """
    if name == QUICKSTART:
        return _local_data(name, QUICKSTART_DATA / ("eval.json" if heldout else "train.json"), WHOLE, heldout)
    base, part = split_name(name)
    if _is_there(name):
        base, part = name, WHOLE
    local = _local(base, DATA_SET)
    if local:
        return _local_data(base, local, part, heldout)
    source = _from_hub(base, DATA_SET, lambda files, card: choose(base, files, part, heldout, True, card))
    return _chosen(source, choose(base, source.sha256, part, heldout, True, _card(base, source.path)))


def _card(name: str, folder: Path) -> str:
    try:
        return card_in(folder)
    except CardError as error:
        raise DataError(f"{name}: {error}. Mend or remove it") from None


def _chosen(source: Source, chosen: data_files.Chosen) -> Source:
    """A data set's folder, of which only the chosen files are used."""
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
    """The files of rows of data sets, in the order in which they are read."""
    return [file for source in sources for file in source.files]


def pins(sources: Sequence[Source]) -> dict[str, str]:
    """File -> hex digest, of a model or data set, or of several, whose files are told apart by their place in the list.

    The place of a source on the disk is not part of a file's name, so that a data set may be moved.
    """
    if len(sources) == 1:
        return sources[0].sha256
    return {f"{place}/{file}": digest for place, source in enumerate(sources) for file, digest in source.sha256.items()}


def check_pinned(role: str, sources: Sequence[Source], pinned: dict[str, str]) -> None:
    """Are the files of a model or of data sets those that a recipe was resolved with?

    Raises:
        UserError: one differs or is missing.
    """
    now = pins(sources)
    places = ", ".join(str(source.path) for source in sources)
    for file, digest in pinned.items():
        if now.get(file) != digest:
            raise UserError(
                f"{places}: {file} is not the file that this recipe was made with (its sha256 differs). Put the "
                f"file back, or remove pinned.{role} from the recipe to start a new run with what is there"
            )


def _local(name: str, kind: _Kind) -> Path | None:
    """The local path that `name` means, or None where it is a hub id."""
    path = Path(name).expanduser() if name == "~" or name.startswith("~/") else Path(name)
    with _told(name, HubError):
        if name and path.exists():
            return path.resolve()
        near = {entry.name: entry for entry in path.parent.iterdir()} if path.parent.is_dir() else {}
        near.pop(path.name, None)  # a link that leads nowhere
    if "://" in name:
        raise HubError(f"{name}: give a hub id as `owner/name` or `owner/name@revision`, not an address")
    outside = name.startswith(("./", "../", "~", "/")) or path.is_absolute()
    if not outside and _is_hub_id(name):
        return None
    absent = f"{name}: there is no such file or folder ({path.absolute()})"
    if similar := difflib.get_close_matches(path.name, near, n=1):
        raise HubError(f"{absent}. Did you mean {near[similar[0]]}?")
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


@contextmanager
def _told(name: str, error_type: type[UserError]) -> Iterator[None]:
    """Tell in words what the system says about a file."""
    try:
        yield
    except OSError as error:
        raise error_type(f"{name}: {error.filename or name} can't be read: {error.strerror or error}") from error


def _local_model(name: str, path: Path) -> Source:
    if not path.is_dir():
        what = "a GGUF file, which is for running, not training" if path.suffix == ".gguf" else "a file"
        raise ModelError(f"{name} is {what}. Give the folder that holds config.json, *.safetensors and the tokenizer")
    with _told(name, ModelError):
        problem = MODEL.broken(path)
    if problem:
        raise ModelError(f"{name}: {problem}")
    return _hashed(name, path, None, MODEL)


def _local_data(name: str, path: Path, part: Part, heldout: bool) -> Source:
    """What the path holds is judged where the rows are read; a pipe or device is not even opened here."""
    with _told(name, DataError):
        if not path.is_dir():
            if part != WHOLE:
                raise DataError(f"{name}: is a file, which has no configs or splits. Leave out {part}")
            return Source(name, path, None, {path.name: sha256_of(path)} if path.is_file() else {}, (path,))
        chosen = choose(name, visible_files(path), part, heldout, card=_card(name, path))
        files = {file: path / file for file in chosen.files}
        digests = {file: sha256_of(found) for file, found in files.items() if found.is_file()}
    return Source(name, path, None, digests, tuple(files.values()) or (path,), chosen.part, chosen.note)


def _hashed(name: str, folder: Path, revision: str | None, kind: _Kind) -> Source:
    with _told(name, kind.error):
        return Source(name, folder, revision, {file: sha256_of(folder / file) for file in kind.used_in(folder)})


def _from_hub(name: str, kind: _Kind, check: Callable[[Iterable[str], str], object] | None = None) -> Source:
    """Fetch what is not in the cache. `check` takes the names of the files on the hub and the text of the card there,
    and raises where they are not as they should."""
    repo_id, _, revision = name.partition("@")
    repository = Repository(repo_id, revision or None, kind.repo_type)
    if is_offline_mode() or COMMIT.fullmatch(revision):
        source = _from_cache(name, repository, kind)
        if source:
            return source
        if is_offline_mode():
            raise HubError(
                f"{name}: no whole copy is in the cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE forbids to "
                "fetch it. Unset HF_HUB_OFFLINE, or give a local folder"
            )
    login = log_in()
    api = HfApi(token=login.token if login else False)
    try:
        info = api.repo_info(
            repo_id, repo_type=kind.repo_type, revision=repository.revision, files_metadata=True, timeout=TIMEOUT
        )
        _check_listing(info)
    except FAILURES as error:
        source = _from_cache(name, repository, kind) if unreachable(error) else None
        if source is None:
            raise explain(error, repository, login) from error
        cause = reason(error, login)
        logger.warning("%s: no answer from the hub (%s). Using the copy in the cache, %s", name, cause, source.pinned)
        return source
    assert isinstance(info, ModelInfo | DatasetInfo)
    return _fetch(name, repository, kind, info, login, check)


def _check_listing(info: Any) -> None:
    """Raises ValueError: what the hub says of a repository's files is not in the form of a hub's answer."""
    files = info.siblings or []
    texts = [info.sha, *(file.rfilename for file in files), *(file.lfs.sha256 for file in files if file.lfs)]
    numbers = [file.size for file in files if file.size is not None]
    if not all(isinstance(text, str) for text in texts) or not all(type(number) is int for number in numbers):
        raise ValueError("not in the form of a hub's answer")


def _from_cache(name: str, repository: Repository, kind: _Kind) -> Source | None:
    """The snapshot in the hub's cache, where the revision is there with all the files that are used."""
    try:
        folder = _snapshot(repository, kind, local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    if kind.broken(folder):
        return None
    source = _hashed(name, folder, folder.name, kind)
    _verify(source, {})
    return source


def _snapshot(repository: Repository, kind: _Kind, token: str | bool = False, local_files_only: bool = False) -> Path:
    """The folder of one commit in the hub's cache. Unless `local_files_only`, the files that lack there are fetched."""
    folder = snapshot_download(
        repository.repo_id,
        repo_type=repository.kind,
        revision=repository.revision,
        allow_patterns=[*kind.files, *(() if local_files_only else kind.beside)],
        ignore_patterns=list(kind.except_files),
        token=token,
        local_files_only=local_files_only,
    )
    return Path(folder)


def _fetch(
    name: str,
    repository: Repository,
    kind: _Kind,
    info: ModelInfo | DatasetInfo,
    login: Login | None,
    check: Callable[[Iterable[str], str], object] | None,
) -> Source:
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
    if problem := kind.lacking(siblings):
        raise kind.error(f"{name}: {problem}")
    wanted = {file: siblings[file] for file in kind.used(siblings)}
    missing = [file for file in wanted if not _in_cache(repository, info.sha, file)]
    try:
        if missing:
            check_access(repository, info, missing[0], login)
        if check is not None:
            check(wanted, _published_card(name, repository, siblings.get(CARD), info.sha, login))
        if missing:
            check_space(repository, sum(wanted[file].size or 0 for file in missing))
            _look_first(name, repository, kind, info, login)
        folder = _snapshot(repository, kind, token=login.token if login else False)
    except FAILURES as error:
        raise explain_download(error, repository, login) from error
    if folder.name != info.sha:
        raise HubError(f"{name}: it changed on the hub while it was fetched. Run again")
    source = _hashed(name, folder, info.sha, kind)
    _verify(source, wanted)
    if problem := kind.broken(folder):
        raise kind.error(f"{name}: {problem}")
    return source


def _published_card(
    name: str, repository: Repository, sibling: RepoSibling | None, commit: str | None, login: Login | None
) -> str:
    """The text of the card on the hub, which from then on lies in the cache too; "" where there is none."""
    if sibling is None or (sibling.size or 0) > LARGEST_CARD:
        return ""
    token = login.token if login else False
    found = hf_hub_download(repository.repo_id, CARD, repo_type=repository.kind, revision=commit, token=token)
    return _card(name, Path(found).parent)


def _look_first(
    name: str, repository: Repository, kind: _Kind, info: ModelInfo | DatasetInfo, login: Login | None
) -> None:
    """Fetch the few small files that can rule out the rest, and judge by them."""
    there = {sibling.rfilename for sibling in info.siblings or []}
    token = login.token if login else False
    for file in (file for file in reversed(kind.first) if file in there):
        found = hf_hub_download(repository.repo_id, file, repo_type=kind.repo_type, revision=info.sha, token=token)
        _require_fit(name, Path(found).parent, kind)


def _require_fit(name: str, folder: Path, kind: _Kind) -> None:
    if problem := kind.unfit(folder, name):
        raise kind.error(f"{name}: {problem}")


def _in_cache(repository: Repository, commit: str | None, file: str) -> bool:
    found = try_to_load_from_cache(repository.repo_id, file, revision=commit, repo_type=repository.kind)
    return isinstance(found, str)


def _verify(source: Source, published: dict[str, RepoSibling]) -> None:
    """Compare files from the hub with the digests that it publishes: sha256 for large ones, git's sha1 for the others.

    Where the hub was not asked (`published` is empty) the cache itself knows them: its files are named by digest.

    Raises:
        HubError: a file is not what the hub publishes.
    """
    for file, sha256 in source.sha256.items():
        path = (source.path / file).resolve()
        digest = path.name
        if sibling := published.get(file):
            digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id or ""
        found = sha256
        if len(digest) == 40:
            content = path.read_bytes()
            found = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        if SHA1_OR_SHA256.fullmatch(digest) and digest != found:
            raise HubError(
                f"{source.name}: {file} is not the file that the hub publishes (its digest should be {digest}): it was "
                f"damaged on the way or on this disk. Delete {path} and run again to fetch it anew"
            )
