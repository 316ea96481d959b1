"""Files become one commit of a repository on the hub: all of them arrive, or none.

In go a repository's name and its files, out comes the address of the commit. What can be known before is checked before
a byte is sent: the token and its rights, whose the repository is, who can see it, and what is in it already.
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

TIMEOUT = 20.0  # seconds, for what the hub says of a repository
NEVER_OURS = ".gitattributes"  # written by the hub into every repository


def upload(
    repo_id: str,
    files: Mapping[str, Path | bytes],
    private: bool,
    force: bool,
    message: str,
    replaced: Sequence[str] = (),
) -> str:
    """Send files to a model repository, which is made where there is none, and return the commit's address.

    repo_id: `owner/name`, or `name` alone for one of the token's owner.
    files: name in the repository -> a file on this machine, or the content.
    private: who can see a new repository; into one that is public already nothing is sent then.
    force: replace files of the same names, and remove those of `replaced`.
    message: of the commit.
    replaced: patterns of files that must not stay beside the new ones.

    Raises:
        HubError: no token, no right, not the user's repository, files or visibility in the way, or no answer.
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
    """`name` -> `user/name`, for the user whose token it is; an id that names its owner stays, where they may write.

    Raises:
        HubError: no hub id, no token, no right to write there, or the hub can't be asked.
    """
    return _sender(repo_id)[1]


def account(repo_id: str) -> str:
    """As whom, and by which token, files would be sent to a repository, in words. Raises as `full_name`."""
    login, full = _sender(repo_id)
    user = check_login(login).get("name") or "the owner of the token"
    return f"to {full} as {user}, by the token in {login.origin}"


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
        raise HubError(f"{error}. For sending files the token needs write right") from None
    user = str(identity.get("name") or "")
    if "/" not in repo_id:
        if not user:
            raise HubError(f"{repo_id}: the hub does not say whose token it is. Give the owner too: owner/{repo_id}")
        repo_id = f"{user}/{repo_id}"
        check_id(repo_id)
    owner = repo_id.split("/")[0]
    places = [name for name in (user, *(str(org.get("name")) for org in identity.get("orgs") or [])) if name]
    if user and owner.lower() not in [place.lower() for place in places]:
        raise HubError(
            f"{repo_id}: {owner} is neither you ({user}, by the token in {login.origin}) nor an organisation of yours. "
            f"Name a repository of one of these: {', '.join(places)}"
        )
    if not may_write(identity, repo_id):
        raise HubError(
            f"{repo_id}: the token in {login.origin} is valid, but has no right to write there. Use a token of the "
            f'type Write, or tick "Write access to contents/settings of all repos" under {owner} for it at '
            f"{constants.ENDPOINT}/settings/tokens"
        )
    return login, repo_id


def check_id(repo_id: str) -> None:
    """Can a repository have this name? `owner/name`, or a name alone.

    Raises:
        HubError: it can't.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise HubError(
            f"{repo_id}: an id on the hub has the form `owner/name`, each of letters, digits, '-', '_' and '.', at "
            "most 96 of them. Give one such, or the name alone for a repository of yours"
        ) from None


def _log_in_to_write() -> str:
    return LOG_IN.format(endpoint=constants.ENDPOINT).replace("read right", "write right")


def may_write(identity: dict[str, Any], repo_id: str) -> bool:
    """Whether a token's rights, as the hub's whoami lists them, cover writing; True where the hub does not say."""
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
            f"{repo_id}: this repository exists and everybody can see it, so nothing was sent. Say --public if that is "
            f"meant, name another one, or make it private at {page}/settings"
        )
    if taken and not force:
        raise HubError(
            f"{repo_id}: this repository holds {', '.join(taken[:5])}{' and more' if len(taken) > 5 else ''} already, "
            "so nothing was sent. Replace them with --force, or name another repository"
        )
    if found.private and not private:
        logger.warning("%s: this repository exists and stays private. Make it public at %s/settings", repo_id, page)


def _explained(error: Exception, repo_id: str, login: Login) -> HuarizoError:
    """The error to raise for a failure of huggingface_hub while files are sent, with its remedy."""
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
        return HubError(f"{repo_id}: the hub does not take the model card ({complaint}); nothing was committed")
    if status in (401, 403, 404):
        return HubError(
            f"{repo_id}: the hub refuses to take files from the owner of the token in {login.origin} ({said}); nothing "
            f"was committed. Make sure that they may write to it, with a token of the type Write, "
            f"{constants.ENDPOINT}/settings/tokens"
        )
    if status in (409, 412):
        return HubError(f"{repo_id}: someone else changed it at the same time; nothing was committed. Run again")
    if status == 429:
        return HubError(f"{repo_id}: the hub has had too many requests from here; nothing was committed. Wait an hour")
    if status >= 500 or status == 408:
        return HubError(
            f"{repo_id}: {constants.ENDPOINT} is in trouble ({said}); nothing was committed. Run again later"
        )
    if refusal:
        return HubError(f"{repo_id}: the hub refuses the files ({said}); nothing was committed. Its page may say why")
    if isinstance(error, RuntimeError) and not isinstance(error, NO_HUB):
        return HubError(
            f"{repo_id}: the upload broke off ({said}); nothing was committed. Run the same command again: files that "
            "arrived whole are not sent twice"
        )
    cause = "what answers there is no hub" if isinstance(error, NO_HUB) else said
    return HubError(
        f"{repo_id}: {constants.ENDPOINT} could not be reached, or the connection broke ({cause}). Check the network, "
        "the proxy and HF_ENDPOINT, and run again: a commit arrives whole or not at all"
    )
