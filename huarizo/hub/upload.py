"""Uploads files to the hub as one commit: all of them arrive, or none.

Before a byte is sent, the token and its permissions, the repository's owner, its visibility and its present files are
checked.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

from huarizo.errors import HuarizoError, HubError, MachineError
from huarizo.hub.access import FAILURES, LOG_IN, NO_HUB, Login, check_login, log_in, reason, unreachable
from huarizo.sandbox.reading import open_file
from huarizo.wording import causes_of

logger = logging.getLogger(__name__)

TIMEOUT = 20.0  # seconds for a repository's information
NEVER_OURS = ".gitattributes"  # written by the hub into every repository


def upload(
    repo_id: str,
    files: Mapping[str, Path | bytes],
    private: bool,
    force: bool,
    message: str,
    replaced: Sequence[str] = (),
) -> str:
    """Send files to a model repository, created if needed. Returns the commit's address.

    repo_id: `owner/name`, or just `name` under the token owner's account.
    files: name in the repository -> local file, or its content.
    private: make a new repository private, and send nothing to an existing public one.
    force: replace files of the same names, and remove those that match `replaced`.
    message: of the commit.
    replaced: patterns of files that must not remain beside the new ones.

    Raises:
        HubError: no token, no permission, not the user's repository, conflicting files or visibility, or no response.
        MachineError: a file can't be read.
    """
    login, repo_id = _sender(repo_id)
    api = HfApi(token=login.token)
    try:
        for file in files.values():
            if isinstance(file, Path):
                open_file(file).close()
        try:
            found = api.model_info(repo_id, timeout=TIMEOUT)
        except RepositoryNotFoundError:
            api.create_repo(repo_id, private=private, exist_ok=True)
            found = api.model_info(repo_id, timeout=TIMEOUT)
        there = [sibling.rfilename for sibling in found.siblings or []]
        stale = [name for name in filter_repo_objects(there, allow_patterns=list(replaced)) if name not in files]
        _check_free(found, repo_id, sorted((set(files) - {NEVER_OURS}) & set(there)) + stale, private, force)
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        operations += [CommitOperationDelete(name) for name in stale]
        commit = api.create_commit(repo_id, operations, commit_message=message, parent_commit=found.sha)
    except FAILURES as error:
        raise _explained(error, repo_id, login) from None
    return str(commit.commit_url)


def full_name(repo_id: str) -> str:
    """`name` -> `user/name` for the token's owner; an id with an owner stays. The token must be allowed to write there.

    Raises:
        HubError: not a hub id, no token, no permission to write there, or the hub is not reachable.
    """
    return _sender(repo_id)[1]


def account(repo_id: str) -> str:
    """A phrase that says as which user and with which token files would be sent. Raises like `full_name`."""
    login, full = _sender(repo_id)
    user = check_login(login).get("name") or "the owner of the token"
    return f"to {full} as {user}, with the token in {login.origin}"


def _sender(repo_id: str) -> tuple[Login, str]:
    """The token that may write to a repository, and the repository's id with its owner."""
    check_id(repo_id)
    if is_offline_mode():
        raise HubError(
            f"{repo_id}: nothing can be sent while HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set. Unset it"
        )
    login = log_in()
    if login is None:
        raise HubError(f"{repo_id}: sending files to the hub needs a token. To log in, {_log_in_to_write()}")
    try:
        identity = check_login(login)
    except HubError as error:
        cause = error.__context__
        if isinstance(cause, Exception) and unreachable(cause):
            raise _explained(cause, repo_id, login) from None
        raise HubError(f"{error}. Sending files needs a token of the type Write") from None
    user = str(identity.get("name") or "")
    if "/" not in repo_id:
        if not user:
            raise HubError(f"{repo_id}: the hub does not say whose token it is. Add the owner: owner/{repo_id}")
        repo_id = f"{user}/{repo_id}"
        check_id(repo_id)
    owner = repo_id.split("/")[0]
    places = [name for name in (user, *(str(org.get("name")) for org in identity.get("orgs") or [])) if name]
    if user and owner.lower() not in [place.lower() for place in places]:
        raise HubError(
            f"{repo_id}: {owner} is neither you ({user}, with the token in {login.origin}) nor one of your "
            f"organisations. Choose a repository of one of these: {', '.join(places)}"
        )
    if not may_write(identity, repo_id):
        raise HubError(
            f"{repo_id}: the token in {login.origin} is valid, but has no permission to write there. Use a token of "
            f'the type Write, or tick "Write access to contents/settings of all repos" under {owner} for it at '
            f"{constants.ENDPOINT}/settings/tokens"
        )
    return login, repo_id


def check_id(repo_id: str) -> None:
    """Check a repository's name: `owner/name`, or just a name.

    Raises:
        HubError: it is not valid.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise HubError(
            f"{repo_id}: a hub id has the form `owner/name`, with letters, digits, '-', '_' and '.', at most 96 "
            "characters. Under your own account, just the name is enough"
        ) from None


def _log_in_to_write() -> str:
    return LOG_IN.format(endpoint=constants.ENDPOINT).replace("type Read", "type Write")


def may_write(identity: dict[str, Any], repo_id: str) -> bool:
    """Whether a token's permissions, from the hub's whoami, cover writing. True if the hub does not list any."""
    access = identity.get("auth", {}).get("accessToken", {})
    if access.get("role") != "fineGrained":
        return access.get("role") != "read"
    places = {place.lower() for place in (repo_id, repo_id.split("/")[0])}
    return any(
        str(scope.get("entity", {}).get("name")).lower() in places and "repo.write" in scope.get("permissions", [])
        for scope in access.get("fineGrained", {}).get("scoped", [])
    )


def _check_free(found: ModelInfo, repo_id: str, taken: Sequence[str], private: bool, force: bool) -> None:
    page = f"{constants.ENDPOINT}/{repo_id}"
    if private and not found.private:
        raise HubError(
            f"{repo_id}: this repository is public, so nothing was sent. Pass --public if that is "
            f"intended, choose another one, or make it private at {page}/settings"
        )
    if taken and not force:
        raise HubError(
            f"{repo_id}: this repository already contains {', '.join(taken[:5])}{' and more' if len(taken) > 5 else ''}"
            ", so nothing was sent. Replace them with --force, or choose another repository"
        )
    if found.private and not private:
        logger.warning("%s: this repository exists and stays private. Make it public at %s/settings", repo_id, page)


def _explained(error: Exception, repo_id: str, login: Login) -> HuarizoError:
    """The error to raise for an exception of huggingface_hub during an upload, with the remedy."""
    causes = list(causes_of(error))
    refusal = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    local = next((cause for cause in causes if isinstance(cause, OSError) and cause.filename), None)
    status = refusal.response.status_code if refusal else 0
    said = reason(causes[-1], login)
    if refusal:
        words = " ".join((refusal.server_message or refusal.response.reason_phrase).split())
        said = f"{status} {words}".replace(login.token, "***")[:300]
    if local and not refusal:
        return MachineError(f"{local.filename}: can't be read ({local.strerror}); nothing was committed. Run again")
    if str(error).startswith("Invalid metadata in README.md"):
        complaint = " ".join(str(error).splitlines()[1:]).replace(login.token, "***")[:300]
        return HubError(f"{repo_id}: the hub does not accept the model card ({complaint}); nothing was committed")
    if status in (401, 403, 404):
        return HubError(
            f"{repo_id}: the hub refuses files from the owner of the token in {login.origin} ({said}); nothing was "
            f"committed. Make sure that they may write to it, and use a token of the type Write: "
            f"{constants.ENDPOINT}/settings/tokens"
        )
    if status in (409, 412):
        return HubError(f"{repo_id}: someone else changed it at the same time; nothing was committed. Run again")
    if status == 429:
        return HubError(f"{repo_id}: too many requests to the hub from here; nothing was committed. Wait an hour")
    if status >= 500 or status == 408:
        return HubError(
            f"{repo_id}: {constants.ENDPOINT} has a server error ({said}); nothing was committed. Run again later"
        )
    if refusal:
        return HubError(f"{repo_id}: the hub refuses the files ({said}); nothing was committed. Its page may say why")
    if isinstance(error, RuntimeError) and not isinstance(error, NO_HUB):
        return HubError(
            f"{repo_id}: the upload failed ({said}); nothing was committed. Run the same command again: files that "
            "were already sent are not sent twice"
        )
    cause = "the response is not a hub's" if isinstance(error, NO_HUB) else said
    return HubError(
        f"{repo_id}: {constants.ENDPOINT} could not be reached, or the connection broke ({cause}). Check the network, "
        "the proxy and HF_ENDPOINT, and run again: a commit arrives whole or not at all"
    )
