"""Fetches the files of one commit of a hub id into the hub's cache, and checks them.

An id with an optional @revision becomes a `Source`. Files already in the cache are not fetched again. A token is looked
for, checked and sent only here. Everything that can rule a download out is checked before anything large is fetched:
the list of files, access, the card, the configuration and the space on disk.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import (
    HfApi,
    constants,
    hf_hub_download,
    is_offline_mode,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.hf_api import DatasetInfo, ModelInfo, RepoSibling

from huarizo.errors import HubError
from huarizo.files import require_space
from huarizo.hub.access import (
    FAILURES,
    Login,
    Repository,
    check_access,
    explain,
    explain_download,
    log_in,
    reason,
    unreachable,
)
from huarizo.hub.data_card import CARD, LARGEST_CARD
from huarizo.hub.sources import Kind, Source, card_of, hashed, require_fit

logger = logging.getLogger(__name__)

COMMIT = re.compile(r"[0-9a-f]{40}")
SHA1_OR_SHA256 = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
TIMEOUT = 20.0  # seconds, for the hub's list of files
Check = Callable[[Iterable[str], str], object]
"""Takes the names of the files on the hub and the text of the card; raises if something is wrong with them."""


def fetch(name: str, kind: Kind, check: Check | None = None) -> Source:
    """The source that a hub id names. Files that are not in the cache are fetched.

    Raises:
        HubError: no such name, no access, no network and no complete copy in the cache, or the download is damaged.
        MachineError: there is no space on the disk.
        UserError: something is wrong with the files; the error is of the kind's type, or from `check`.
    """
    repo_id, _, revision = name.partition("@")
    repository = Repository(repo_id, revision or None, kind.repo_type)
    if is_offline_mode() or COMMIT.fullmatch(revision):
        source = _from_cache(name, repository, kind)
        if source:
            return source
        if is_offline_mode():
            raise HubError(
                f"{name}: the cache ({constants.HF_HUB_CACHE}) has no complete copy, and HF_HUB_OFFLINE forbids "
                "fetching. Unset HF_HUB_OFFLINE, or use a local folder"
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
    return _fetch_missing(name, repository, kind, info, login, check)


def _check_listing(info: Any) -> None:
    """Raise ValueError if the hub's list of a repository's files is malformed."""
    files = info.siblings or []
    texts = [info.sha, *(file.rfilename for file in files), *(file.lfs.sha256 for file in files if file.lfs)]
    numbers = [file.size for file in files if file.size is not None]
    if not all(isinstance(text, str) for text in texts) or not all(type(number) is int for number in numbers):
        raise ValueError("not in the form of a hub's answer")


def _from_cache(name: str, repository: Repository, kind: Kind) -> Source | None:
    """The snapshot in the hub's cache, if it has this revision with all used files."""
    try:
        folder = _snapshot(repository, kind, local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    if kind.broken(folder):
        return None
    source = hashed(name, folder, folder.name, kind)
    _verify(source, {})
    return source


def _snapshot(repository: Repository, kind: Kind, token: str | bool = False, local_files_only: bool = False) -> Path:
    """The folder of one commit in the hub's cache. Unless `local_files_only`, missing files are fetched."""
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


def _fetch_missing(
    name: str,
    repository: Repository,
    kind: Kind,
    info: ModelInfo | DatasetInfo,
    login: Login | None,
    check: Check | None,
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
            size = sum(wanted[file].size or 0 for file in missing)
            require_space(Path(constants.HF_HUB_CACHE), size, name, "set HF_HOME to a folder on another disk")
            _look_first(name, repository, kind, info, login)
        folder = _snapshot(repository, kind, token=login.token if login else False)
    except FAILURES as error:
        raise explain_download(error, repository, login) from error
    if folder.name != info.sha:
        raise HubError(f"{name}: it changed on the hub while it was fetched. Run again")
    source = hashed(name, folder, info.sha, kind)
    _verify(source, wanted)
    if problem := kind.broken(folder):
        raise kind.error(f"{name}: {problem}")
    return source


def _published_card(
    name: str, repository: Repository, sibling: RepoSibling | None, commit: str | None, login: Login | None
) -> str:
    """The text of the card on the hub, which is then in the cache too; "" if there is none."""
    if sibling is None or (sibling.size or 0) > LARGEST_CARD:
        return ""
    token = login.token if login else False
    found = hf_hub_download(repository.repo_id, CARD, repo_type=repository.kind, revision=commit, token=token)
    return card_of(name, Path(found).parent)


def _look_first(
    name: str, repository: Repository, kind: Kind, info: ModelInfo | DatasetInfo, login: Login | None
) -> None:
    """Fetch the few small files that can rule out the rest, and check them."""
    there = {sibling.rfilename for sibling in info.siblings or []}
    token = login.token if login else False
    for file in (file for file in reversed(kind.first) if file in there):
        found = hf_hub_download(repository.repo_id, file, repo_type=kind.repo_type, revision=info.sha, token=token)
        require_fit(name, Path(found).parent, kind)


def _in_cache(repository: Repository, commit: str | None, file: str) -> bool:
    found = try_to_load_from_cache(repository.repo_id, file, revision=commit, repo_type=repository.kind)
    return isinstance(found, str)


def _verify(source: Source, published: dict[str, RepoSibling]) -> None:
    """Compare files from the hub with the digests that it publishes: sha256 for large files, git's sha1 for the others.

    If the hub was not asked (`published` is empty), the digests come from the cache, whose files are named by them.

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
                f"damaged in transit or on this disk. Delete {path} and run again to fetch it again"
            )
