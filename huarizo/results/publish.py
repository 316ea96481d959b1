"""Selects and checks what a run sends to the hub: its adapter, merged model or GGUF files, with a model card.

The list of everything that would be sent is made first, to be shown before anything is. Only files of known names are
taken, and local paths and secrets are removed from them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huarizo.errors import ModelError, UserError
from huarizo.hub.model_files import INDEX, LICENCES, broken, weight_files
from huarizo.hub.quickstart import QUICKSTART
from huarizo.hub.upload import check_id, full_name, upload
from huarizo.model.adapter import CONFIG, WEIGHTS, check_adapter
from huarizo.results.card import CARD, What, hub_card, hub_id_of, public_name
from huarizo.runs import Run
from huarizo.wording import TOKEN

TOKENIZER = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "added_tokens.json"),
)
SENT: dict[What, tuple[str, ...]] = {
    "adapter": (CONFIG, WEIGHTS, *TOKENIZER),
    "merged": ("config.json", "generation_config.json", "*.safetensors", INDEX, *TOKENIZER, *LICENCES),
    "gguf": ("*.gguf", "Modelfile"),
}
"""Patterns of the files to send."""
WEIGHTS_OF_A_MODEL = ("*.safetensors", INDEX)
TEXTS = (".json", ".jinja", ".txt", ".md", "")  # suffixes of texts; none: LICENSE, Modelfile
LOCAL_PATH = re.compile(r"/|~|\.{1,2}[\\/]|\\\\|[A-Za-z]:[\\/]|file:")
VOCABULARY = ("model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder")
"""Parts of tokenizer.json whose texts are tokens and patterns, which may look like paths."""
TOKENS = re.compile(r"content|chat_template|.*_tokens?")
SECRETS = ("token", "auth_token", "use_auth_token", "hub_token", "api_key")
"""Fields that are never sent."""
OWNER = "OWNER/"  # placeholder in a card until the hub has named the user


@dataclass(frozen=True)
class Publication:
    """What would be sent to the hub: name in the repository -> file of the run, or content made from it."""

    repo_id: str
    private: bool
    files: dict[str, Path | bytes]
    replaced: tuple[str, ...] = ()
    """Patterns of files that must not remain beside these; `--force` removes them."""

    def __str__(self) -> str:
        """A listing of everything that would be sent, to review beforehand."""
        sizes = {name: len(c) if isinstance(c, bytes) else c.stat().st_size for name, c in self.files.items()}
        rows = [f"  {name}  {size:,} bytes" for name, size in sizes.items()]
        seen_by = "private" if self.private else "public: everyone can see it"
        card = self.files.get(CARD, b"")
        text = card.decode("utf-8") if isinstance(card, bytes) else card.read_text(encoding="utf-8")
        return "\n".join([f"repository: {self.repo_id} ({seen_by})", "files:", *rows, f"{CARD}:", text])


def publication(
    run: Run, repo_id: str, what: What = "adapter", public: bool = False, base_model: str | None = None
) -> Publication:
    """Gather what a run has to send. Does not contact the hub.

    base_model: folder or hub id of the base that the card names, if it has moved.

    Raises:
        UserError: an invalid repository name, no such base, nothing of that kind yet, a link that leads out of the
            run's folder, or a file that contains a local path or a token.
        ModelError: the adapter or the merged model is incomplete.
    """
    check_id(repo_id)
    recipe = run.recipe()
    recipe.model = _known(base_model) if base_model else recipe.model
    found = _found(run, what)
    base = public_name(recipe.model)
    private = [str(place) for place in (Path.home(), Path.cwd(), run.path.resolve().parent) if len(place.parts) > 1]
    files: dict[str, Path | bytes] = {
        f.name: _without_paths(f, base, private) if f.suffix == ".json" else f for f in found
    }
    if "Modelfile" in files:
        _check_modelfile(run.path / "Modelfile")
    ggufs = [file for file in found if file.suffix == ".gguf"]
    files[CARD] = hub_card(run, recipe, repo_id if "/" in repo_id else OWNER + repo_id, what, ggufs).encode()
    _check_no_token(files)
    return Publication(repo_id, not public, files, WEIGHTS_OF_A_MODEL if what == "merged" else ())


def _known(base_model: str) -> str:
    """A base's name, checked: a local folder, or of the form of a hub id."""
    if base_model != QUICKSTART and hub_id_of(base_model) is None and not Path(base_model).is_dir():
        raise UserError(f"--base-model {base_model}: no such folder, and not a hub id (owner/name)")
    return base_model


def publish(publication: Publication, force: bool = False) -> str:
    """Send it. Returns the commit's address.

    Raises:
        HubError: no token, no permission, conflicting files or visibility, or no response. Nothing was committed.
        MachineError: a file can't be read.
    """
    files, repo_id, card = dict(publication.files), publication.repo_id, publication.files[CARD]
    if "/" not in repo_id and isinstance(card, bytes):
        name = full_name(repo_id)
        files[CARD] = card.replace((OWNER + repo_id).encode(), name.encode())
        repo_id = name
    return upload(repo_id, files, publication.private, force, "Upload with Huarizo", publication.replaced)


def _found(run: Run, what: What) -> list[Path]:
    """The files of a kind, checked to be complete."""
    folder = {"adapter": run.adapter, "merged": run.path / "merged", "gguf": run.path}[what]
    paths = {path: None for pattern in SENT[what] for path in sorted(folder.glob(pattern))}
    found = [path for path in paths if not path.name.startswith(".") and (path.is_file() or path.is_symlink())]
    for path in found:
        _check_inside(path, folder)
        if not path.is_file():
            raise UserError(f"{path}: this link does not lead to a file. Replace it with the file itself")
    if what == "adapter":
        if not (folder / WEIGHTS).is_file():
            raise UserError(f"{run.path}: this run has no adapter yet. Resume it: huarizo resume {run.path}")
        check_adapter(folder)
    elif what == "merged":
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: there is no merged model yet. Write it first: huarizo merge {run.path}")
        if problem := broken(folder):
            raise ModelError(f"{folder}: {problem}")
        weights = weight_files(folder)
        found = [path for path in found if path.suffix != ".safetensors" or path.name in weights]
    elif not any(path.suffix == ".gguf" for path in found):
        raise UserError(f"{run.path}: there is no GGUF file yet. Write one first: huarizo export {run.path}")
    return found


def _check_inside(file: Path, folder: Path) -> None:
    if not file.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"{file}: this link leads out of {folder} (to {file.resolve()}), so it is not sent. Replace it "
            "with the file itself"
        )


def _check_no_token(files: Mapping[str, Path | bytes]) -> None:
    """Refuse texts that contain what looks like a hub token."""
    for name, content in files.items():
        if isinstance(content, Path) and content.suffix not in TEXTS:
            continue
        text = content if isinstance(content, bytes) else content.read_bytes()
        if TOKEN.search(text.decode("utf-8", "replace")):
            raise UserError(
                f"{name}: it contains a hub token, so nothing is sent. Remove the token (a card's samples come from "
                "samples.jsonl), and revoke it if others may have seen it"
            )


def _without_paths(file: Path, base: str, private: Sequence[str]) -> Path | bytes:
    """A JSON file without secrets and local paths; the file itself if it has none.

    private: folders of this machine that no text may contain.
    """
    try:
        values = json.loads(file.read_bytes())
        cleaned = _cleaned(values, private, file.name == "tokenizer.json")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{file}: can't be read as JSON ({error}). Write it again, or put a whole copy there"
        ) from None
    if file.name == CONFIG and isinstance(cleaned, dict):
        cleaned["base_model_name_or_path"] = base
    return file if cleaned == values else (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()


def _cleaned(value: object, private: Sequence[str], keeps_vocabulary: bool = False) -> object:
    """Drop secrets, and fields and items that contain a local path. Texts that are tokens stay."""
    if isinstance(value, list):
        return [_cleaned(inner, private) for inner in value if not _is_local_path(inner, private)]
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, inner in value.items():
        if key in SECRETS:
            continue
        if TOKENS.fullmatch(key) or (keeps_vocabulary and key in VOCABULARY):
            kept[key] = inner
        elif not _is_local_path(inner, private):
            kept[key] = _cleaned(inner, private)
    return kept


def _is_local_path(value: object, private: Sequence[str] = ()) -> bool:
    return isinstance(value, str) and (bool(LOCAL_PATH.match(value)) or any(place in value for place in private))


def _check_modelfile(file: Path) -> None:
    for line in filter(str.strip, file.read_text(encoding="utf-8", errors="replace").splitlines()):
        word, *rest = line.split(maxsplit=1)
        place = Path(rest[0].strip(" \"'") if rest else "")
        elsewhere = place.name != str(place) or _is_local_path(str(place))  # pathlib strips ./
        if word.upper() in ("FROM", "ADAPTER") and elsewhere:
            raise UserError(
                f"{file}: {line.strip()!r} names a path on this machine, which others don't have. Write "
                f"{word} ./FILE.gguf, the file beside it"
            )
