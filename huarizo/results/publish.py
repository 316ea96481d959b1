"""What of a run goes to the hub: its adapter, its merged model or its GGUF files, with a model card.

In goes a run, out comes the list of all that would be sent, to be shown before anything is. Only files on a list are
taken, and none of them may tell the folders of the machine that they come from.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
"""Patterns of the files that are sent."""
WEIGHTS_OF_A_MODEL = ("*.safetensors", INDEX)
TEXTS = (".json", ".jinja", ".txt", ".md", "")  # endings, and none: LICENSE, Modelfile
LOCAL_PATH = re.compile(r"/|~|\.{1,2}[\\/]|\\\\|[A-Za-z]:[\\/]|file:")
VOCABULARY = ("model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder")
"""Parts of tokenizer.json whose texts are tokens and patterns, which may begin as a path does."""
TOKENS = re.compile(r"content|chat_template|.*_tokens?")
SECRETS = ("token", "auth_token", "use_auth_token", "hub_token", "api_key")
"""Fields that are never sent, whatever they hold."""
OWNER = "OWNER/"  # stands in a card for the user who is known only when the hub is asked


@dataclass(frozen=True)
class Publication:
    """What would be sent to the hub: names in the repository -> files of the run, or contents made from them."""

    repo_id: str
    private: bool
    files: dict[str, Path | bytes]
    replaced: tuple[str, ...] = ()
    """Patterns of files that must not stay beside these, and go with `--force`."""

    def __str__(self) -> str:
        """All that is sent, for people to look at before it is."""
        sizes = {name: len(c) if isinstance(c, bytes) else c.stat().st_size for name, c in self.files.items()}
        rows = [f"  {name}  {size:,} bytes" for name, size in sizes.items()]
        seen_by = "private" if self.private else "public: everybody can see it"
        card = self.files.get(CARD, b"")
        text = card.decode("utf-8") if isinstance(card, bytes) else card.read_text(encoding="utf-8")
        return "\n".join([f"repository: {self.repo_id} ({seen_by})", "files:", *rows, f"{CARD}:", text])


def publication(
    run: Run, repo_id: str, what: What = "adapter", public: bool = False, base_model: str | None = None
) -> Publication:
    """Gather what a run has to send; the hub is not asked.

    base_model: folder or hub id of the base that the card names, where it is no longer where the run says.

    Raises:
        UserError: no name for a repository or no such base, nothing of that kind yet, a file that leads out of
            the run's folder or tells a local path.
        ModelError: the adapter or the merged model is not whole.
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
    """A base's name, which is that of a folder here or has the form of a hub id."""
    if base_model != QUICKSTART and hub_id_of(base_model) is None and not Path(base_model).is_dir():
        raise UserError(f"--base-model {base_model}: no such folder, and no id of the hub (owner/name)")
    return base_model


def publish(publication: Publication, force: bool = False) -> str:
    """Send it, and return the commit's address.

    Raises:
        HubError: no token, no right, files or visibility in the way, or no answer; nothing was committed.
        MachineError: a file can't be read.
    """
    files, repo_id, card = dict(publication.files), publication.repo_id, publication.files[CARD]
    if "/" not in repo_id and isinstance(card, bytes):
        name = full_name(repo_id)
        files[CARD] = card.replace((OWNER + repo_id).encode(), name.encode())
        repo_id = name
    return upload(repo_id, files, publication.private, force, "Upload with Huarizo", publication.replaced)


def _found(run: Run, what: What) -> list[Path]:
    """The files of a kind, after a look at whether they are whole."""
    folder = {"adapter": run.adapter, "merged": run.path / "merged", "gguf": run.path}[what]
    paths = {path: None for pattern in SENT[what] for path in sorted(folder.glob(pattern))}
    found = [path for path in paths if not path.name.startswith(".") and (path.is_file() or path.is_symlink())]
    for path in found:
        _check_inside(path, folder)
        if not path.is_file():
            raise UserError(f"{path}: this is a link to what is no file. Put the file itself in its place")
    if what == "adapter":
        if not (folder / WEIGHTS).is_file():
            raise UserError(f"{run.path}: this run has no adapter yet. Go on with it: huarizo resume {run.path}")
        check_adapter(folder)
    elif what == "merged":
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: there is no merged model yet. Make it first: huarizo merge {run.path}")
        if problem := broken(folder):
            raise ModelError(f"{folder}: {problem}")
        weights = weight_files(folder)
        found = [path for path in found if path.suffix != ".safetensors" or path.name in weights]
    elif not any(path.suffix == ".gguf" for path in found):
        raise UserError(f"{run.path}: there is no GGUF file yet. Make one first: huarizo export {run.path}")
    return found


def _check_inside(file: Path, folder: Path) -> None:
    if not file.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"{file}: this link leads out of {folder} (to {file.resolve()}), so it is not sent. Put the file itself "
            "in its place"
        )


def _check_no_token(files: Mapping[str, Path | bytes]) -> None:
    """The texts that would be sent hold nothing that looks like a token of the hub."""
    for name, content in files.items():
        if isinstance(content, Path) and content.suffix not in TEXTS:
            continue
        text = content if isinstance(content, bytes) else content.read_bytes()
        if TOKEN.search(text.decode("utf-8", "replace")):
            raise UserError(
                f"{name}: there is a token of the hub in it, so nothing is sent. Take it out (a card's samples come "
                "from samples.jsonl), and revoke it where others may have seen it"
            )


def _without_paths(file: Path, base: str, private: Sequence[str]) -> Path | bytes:
    """A JSON file as it is sent: without secrets and texts that are local paths; the file itself where there are none.

    private: folders of this machine that no text may name.
    """
    try:
        values = json.loads(file.read_bytes())
        cleaned = _cleaned(values, private, file.name == "tokenizer.json")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: can't be read as JSON ({error}). Make it again, or put a whole copy there") from None
    if file.name == CONFIG and isinstance(cleaned, dict):
        cleaned["base_model_name_or_path"] = base
    return file if cleaned == values else (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()


def _cleaned(value: Any, private: Sequence[str], keeps_vocabulary: bool = False) -> Any:
    """Secrets, and fields and items that tell a local path, are left out; texts that are tokens stay."""
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


def _is_local_path(value: Any, private: Sequence[str] = ()) -> bool:
    return isinstance(value, str) and (bool(LOCAL_PATH.match(value)) or any(place in value for place in private))


def _check_modelfile(file: Path) -> None:
    for line in filter(str.strip, file.read_text(encoding="utf-8", errors="replace").splitlines()):
        word, *rest = line.split(maxsplit=1)
        place = Path(rest[0].strip(" \"'") if rest else "")
        elsewhere = place.name != str(place) or _is_local_path(str(place))  # pathlib takes ./ off
        if word.upper() in ("FROM", "ADAPTER") and elsewhere:
            raise UserError(
                f"{file}: {line.strip()!r} names a folder of this machine, where others find nothing. Write "
                f"{word} ./FILE.gguf, the file beside it"
            )
