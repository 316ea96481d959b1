"""Finds the hub token, checks what it may read, and explains the hub's error responses.

Exceptions of huggingface_hub become errors whose message names the cause and the remedy. A token is sent only to the
hub: no message or log line contains it.
"""

import errno
import io
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import dotenv
from huggingface_hub import HfApi, constants, get_hf_file_metadata, get_token, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import DatasetInfo, ModelInfo

from huarizo.errors import HuarizoError, HubError, MachineError
from huarizo.sandbox.reading import read_bytes
from huarizo.wording import causes_of

try:  # the client that huggingface_hub uses
    import httpx2 as httpx
except ImportError:
    import httpx  # pyright: ignore[reportMissingImports]

LARGEST_DOTENV = 100_000  # bytes
LOG_IN = (
    "make a token of the type Read at {endpoint}/settings/tokens, then run `hf auth login`, or set the environment "
    "variable HF_TOKEN, or write HF_TOKEN=... into a file .env in this folder"
)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
NO_HUB = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What huggingface_hub raises when a response is not of the form that a hub sends."""
FAILURES = (httpx.HTTPError, httpx.InvalidURL, OSError, RuntimeError, *NO_HUB)
"""What huggingface_hub raises when the hub, the network or the disk fails (RuntimeError: from its Xet client)."""


@dataclass(frozen=True)
class Login:
    """A token, and the place where it was found, for messages."""

    token: str = field(repr=False)
    origin: str


@dataclass(frozen=True)
class Repository:
    """A model or data set on the hub, as the recipe names it."""

    repo_id: str
    revision: str | None
    kind: Literal["model", "dataset"]

    @property
    def noun(self) -> str:
        return "model" if self.kind == "model" else "data set"

    @property
    def page(self) -> str:
        """The web page where access is requested and revisions are listed."""
        return f"{constants.ENDPOINT}/{'datasets/' if self.kind == 'dataset' else ''}{self.repo_id}"


def log_in() -> Login | None:
    """The hub token from HF_TOKEN, `hf auth login`, or a file .env in the current folder; None if there is none.

    The user's own login comes first. A .env is only read if file and folder belong to the user, so that a folder from
    elsewhere can't decide whose token is used.

    Raises:
        HubError: what was found can't be a token.
    """
    token, origin = (os.environ.get("HF_TOKEN") or "").strip(), "the environment variable HF_TOKEN"
    if not token:
        token, origin = get_token() or "", "what `hf auth login` stored"
    if not token:
        token, origin = _token_in_dotenv(), str(Path(".env").absolute())
    if token and not re.fullmatch(r"[!-~]+", token):
        raise HubError(
            f"The token in {origin} contains a character that no token has, such as a space. Copy the whole token again"
        )
    return Login(token, origin) if token else None


def _token_in_dotenv() -> str:
    file = Path(".env")
    try:
        if not file.is_file() or not all(map(_is_own, (file, file.parent))):
            return ""
        text = read_bytes(file, LARGEST_DOTENV).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise HubError(
            f"{file.absolute()} can't be read as UTF-8 text ({type(error).__name__}). Save it again, or remove it"
        ) from None
    return (dotenv.dotenv_values(stream=io.StringIO(text), interpolate=False).get("HF_TOKEN") or "").strip()


def _is_own(path: Path) -> bool:
    return not hasattr(os, "getuid") or path.stat().st_uid == os.getuid()


def check_login(login: Login) -> dict[str, Any]:
    """Ask the hub whose token this is. {} if it does not answer that: rate limit, or a mirror.

    Raises:
        HubError: the token is not valid, or the hub could not be asked.
    """
    try:
        identity = HfApi(token=login.token).whoami(cache=True)
        _check_identity(identity)
        return identity
    except HfHubHTTPError as error:
        if error.response.status_code in (404, 429):
            return {}
        if error.response.status_code not in (401, 403):
            raise HubError(f"The token in {login.origin} could not be checked: {reason(error, login)}") from None
        raise HubError(
            f"The token in {login.origin} is not valid: it was deleted, has expired, or was not copied completely. "
            f"For another one, {LOG_IN.format(endpoint=constants.ENDPOINT)}. Public models need no token: "
            "for them, remove this one"
        ) from None
    except FAILURES as error:
        raise HubError(f"The token in {login.origin} could not be checked: {reason(error, login)}") from None


def _check_identity(identity: dict[str, Any]) -> None:
    """Raises one of NO_HUB if it lacks the form that `may_read` and `may_write` expect."""
    for org in identity.get("orgs") or []:
        org.get("name")
    scopes = identity.get("auth", {}).get("accessToken", {}).get("fineGrained", {}).get("scoped", [])
    for scope in scopes:
        scope.get("entity", {}).get("name")
        set(scope["permissions"])


def may_read(identity: dict[str, Any], repository: Repository, gated: bool) -> bool:
    """Whether a token's permissions, from the hub's whoami, cover the contents of a gated or private repository.

    Only fine-grained tokens can read less than their owner.
    """
    access = identity.get("auth", {}).get("accessToken", {})
    if access.get("role") != "fineGrained":
        return True
    rights = access.get("fineGrained", {})
    if gated and rights.get("canReadGatedRepos"):
        return True
    places = (repository.repo_id, repository.repo_id.split("/")[0])
    return any(
        scope.get("entity", {}).get("name") in places
        and {"repo.content.read", "repo.write"} & set(scope["permissions"])
        for scope in rights.get("scoped", [])
    )


def check_access(repository: Repository, info: ModelInfo | DatasetInfo, file: str, login: Login | None) -> None:
    """Check, before fetching anything, that the token is valid and may read the repository and `file`.

    Raises:
        HubError: the token is not valid or has no permission to read.
        HfHubHTTPError: the hub refuses; `explain` turns it into an error.
    """
    if login:
        identity = check_login(login)
        if (info.private or info.gated) and not may_read(identity, repository, bool(info.gated)):
            raise no_right(repository, login, bool(info.gated))
    url = hf_hub_url(repository.repo_id, file, repo_type=repository.kind, revision=info.sha)
    get_hf_file_metadata(url, token=login.token if login else False)


def no_right(repository: Repository, login: Login, gated: bool) -> HubError:
    """The error for a valid token without permission to read this repository."""
    box = "Read access to contents of all public gated repos you can access" if gated else "Read access to contents"
    return HubError(
        f"{repository.repo_id}: the token in {login.origin} is valid, but has no permission to read this "
        f'{repository.noun}. Tick "{box}" for it at {constants.ENDPOINT}/settings/tokens, or use '
        "a token of the type Read"
    )


def explain(error: Exception, repository: Repository, login: Login | None) -> HuarizoError:
    """The error to raise for an exception of huggingface_hub, with the remedy."""
    name, status = repository.repo_id, _status(error)
    if isinstance(error, RevisionNotFoundError):
        return HubError(
            f"{name}: there is no revision {repository.revision!r}. Use a branch, tag or commit listed at "
            f"{repository.page}/commits/main, or none for the newest"
        )
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
        return _refused(error, repository, login)
    if status == 429:
        return HubError(
            f"{name}: too many requests to the hub from here. Wait some minutes; logging in raises the limit"
        )
    if status >= 500 or status == 408:
        return HubError(
            f"{name}: {constants.ENDPOINT} has a server error ({reason(error, login)}), and the cache has no complete "
            "copy. Try again later, or use a local folder instead of a hub id"
        )
    if unreachable(error):
        cause = "the response is not a hub's" if isinstance(error, NO_HUB) else reason(error, login)
        return HubError(
            f"{name}: {constants.ENDPOINT} could not be reached ({cause}), and the cache has no complete copy. Check "
            "the network, the proxy and HF_ENDPOINT, or use a local folder instead of a hub id"
        )
    return HubError(f"{name}: could not be fetched ({reason(error, login)}). Try again later")


def _refused(error: Exception, repository: Repository, login: Login | None) -> HuarizoError:
    name, noun, page = repository.repo_id, repository.noun, repository.page
    gated = isinstance(error, GatedRepoError)
    log_in = LOG_IN.format(endpoint=constants.ENDPOINT)
    if gated and login is None:
        return HubError(f"{name}: this {noun} is gated. Request access at {page}; then log in: {log_in}")
    identity = check_login(login) if login else {}
    readable = may_read(identity, repository, gated)
    if gated and login and readable:
        return HubError(
            f"{name}: this {noun} is gated, and {identity.get('name', 'the owner of the token')} (token in "
            f"{login.origin}) has no access to it yet. Request access at {page} and run again once it is granted"
        )
    if isinstance(error, RepositoryNotFoundError) and not gated:
        advice = f"If it is private, log in: {log_in}"
        if login:
            advice = f"If it is private, the token in {login.origin} "
            advice += "belongs to someone without access" if readable else "has no permission to read it"
        return HubError(
            f"{name}: there is no such {noun} at {constants.ENDPOINT}. Check the spelling. {advice}. "
            f"If you meant a local folder: {Path(name).absolute()} does not exist"
        )
    if login and not readable:
        return no_right(repository, login, gated)
    return HubError(f"{name}: the hub refuses access ({reason(error, login)}). Its page, {page}, may say why")


def explain_download(error: Exception, repository: Repository, login: Login | None) -> HuarizoError:
    """The error to raise when a download failed: because of the disk, the network or the hub."""
    causes = list(causes_of(error))
    numbers = {cause.errno for cause in causes if isinstance(cause, OSError)}
    if numbers & set(NO_SPACE) or any("No space left" in str(cause) for cause in causes):
        return MachineError(
            f"{repository.repo_id}: the disk of {constants.HF_HUB_CACHE} is full. Free some space, or set HF_HOME to a "
            "folder on another disk, and run again: files already downloaded are kept"
        )
    if numbers & set(NOT_WRITABLE):
        return MachineError(
            f"{repository.repo_id}: {constants.HF_HUB_CACHE} is not writable. Fix its permissions, or set HF_HOME to "
            "a writable folder"
        )
    refusal = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    if refusal and _status(refusal) < 500:
        return explain(refusal, repository, login)
    return HubError(
        f"{repository.repo_id}: the download failed ({reason(causes[-1], login)}). Run the same command again: files "
        "already downloaded are kept"
    )


def unreachable(error: Exception) -> bool:
    """Whether no hub answered: no network, a timeout, an overloaded server, or a response that is not a hub's."""
    if isinstance(error, HfHubHTTPError):
        return _status(error) in (408, 429) or _status(error) >= 500
    return isinstance(error, (httpx.TransportError, httpx.InvalidURL, OSError, *NO_HUB))


def reason(error: BaseException, login: Login | None) -> str:
    """An exception in one short line, with the token removed in case a library put it there."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0].rstrip('.:')[:200]}" if lines else type(error).__name__
    return text.replace(login.token, "***") if login else text


def _status(error: BaseException) -> int:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else 0
