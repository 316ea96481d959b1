"""What of a run goes to the hub: its adapter, its merged model or its GGUF files, with a model card.

In goes a run, out comes the list of all that would be sent, to be shown before anything is. Only files on a list are
taken, and none of them may tell the folders of the machine that they come from.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huarizo.errors import ModelError, UserError
from huarizo.hub.model_files import INDEX, broken
from huarizo.hub.upload import check_id, full_name, upload
from huarizo.model.adapter import CONFIG, WEIGHTS, check_adapter
from huarizo.results.card import CARD, What, hub_card, public_name
from huarizo.results.merge import LICENCES
from huarizo.runs import Run

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
LOCAL_PATH = re.compile(r"/|~|\\\\|[A-Za-z]:[\\/]|file:")
VOCABULARY = ("model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder")
"""Parts of tokenizer.json whose texts are tokens and patterns, which may begin as a path does."""
TOKENS = re.compile(r"content|chat_template|.*_tokens?")
OWNER = "OWNER/"  # stands in a card for the user who is known only when the hub is asked


@dataclass(frozen=True)
class Publication:
    """What would be sent to the hub: names in the repository -> files of the run, or contents made from them."""

    repo_id: str
    private: bool
    files: dict[str, Path | bytes]

    def __str__(self) -> str:
        """All that is sent, for people to look at before it is."""
        sizes = {name: len(c) if isinstance(c, bytes) else c.stat().st_size for name, c in self.files.items()}
        rows = [f"  {name}  {size:,} bytes" for name, size in sizes.items()]
        seen_by = "private" if self.private else "public: everybody can see it"
        card = self.files.get(CARD, b"")
        text = card.decode("utf-8") if isinstance(card, bytes) else card.read_text(encoding="utf-8")
        return "\n".join([f"repository: {self.repo_id} ({seen_by})", "files:", *rows, f"{CARD}:", text])


def publication(run: Run, repo_id: str, what: What = "adapter", public: bool = False) -> Publication:
    """Gather what a run has to send; the hub is not asked.

    Raises:
        UserError: no name for a repository, nothing of that kind yet, a file that leads out of the run's folder or
            tells a local path.
        ModelError: the adapter or the merged model is not whole.
    """
    check_id(repo_id)
    recipe = run.recipe()
    found = _found(run, what)
    base = public_name(recipe.model)
    files: dict[str, Path | bytes] = {f.name: _without_paths(f, base) if f.suffix == ".json" else f for f in found}
    if "Modelfile" in files:
        _check_modelfile(run.path / "Modelfile")
    ggufs = [name for name in files if name.endswith(".gguf")]
    files[CARD] = hub_card(run, recipe, repo_id if "/" in repo_id else OWNER + repo_id, what, ggufs).encode()
    return Publication(repo_id, not public, files)


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
    return upload(repo_id, files, publication.private, force, "Upload with Huarizo")


def _found(run: Run, what: What) -> list[Path]:
    """The files of a kind, after a look at whether they are whole."""
    folder = {"adapter": run.adapter, "merged": run.path / "merged", "gguf": run.path}[what]
    paths = {path: None for pattern in SENT[what] for path in sorted(folder.glob(pattern))}
    found = [path for path in paths if not path.name.startswith(".") and (path.is_file() or path.is_symlink())]
    for path in found:
        _check_inside(path, run.path)
    if what == "adapter":
        if not (folder / WEIGHTS).is_file():
            raise UserError(f"{run.path}: this run has no adapter yet. Go on with it: huarizo resume {run.path}")
        check_adapter(folder)
    elif what == "merged":
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: there is no merged model yet. Make it first: huarizo merge {run.path}")
        if problem := broken(folder):
            raise ModelError(f"{folder}: {problem}")
    elif not any(path.suffix == ".gguf" for path in found):
        raise UserError(f"{run.path}: there is no GGUF file yet. Make one first: huarizo export {run.path}")
    return found


def _check_inside(file: Path, folder: Path) -> None:
    if not file.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"{file}: this link leads out of the run's folder ({file.resolve()}), so it is not sent. Put the file "
            "itself in its place"
        )


def _without_paths(file: Path, base: str) -> Path | bytes:
    """A JSON file as it is sent: without the texts that are local paths; the file itself where there are none."""
    try:
        values = json.loads(file.read_bytes())
        cleaned = _cleaned(values, file.name == "tokenizer.json")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: can't be read as JSON ({error}). Make it again, or put a whole copy there") from None
    if file.name == CONFIG and isinstance(cleaned, dict):
        cleaned["base_model_name_or_path"] = base
    return file if cleaned == values else (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()


def _cleaned(value: Any, keeps_vocabulary: bool = False) -> Any:
    """Fields and items that are local paths are left out, but for texts that are tokens."""
    if isinstance(value, dict):
        return {
            key: inner if TOKENS.fullmatch(key) or (keeps_vocabulary and key in VOCABULARY) else _cleaned(inner)
            for key, inner in value.items()
            if TOKENS.fullmatch(key) or not _is_local_path(inner)
        }
    return [_cleaned(inner) for inner in value if not _is_local_path(inner)] if isinstance(value, list) else value


def _is_local_path(value: Any) -> bool:
    return isinstance(value, str) and bool(LOCAL_PATH.match(value))


def _check_modelfile(file: Path) -> None:
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        word, _, place = line.strip().partition(" ")
        if word.upper() in ("FROM", "ADAPTER") and _is_local_path(place.strip(" \"'")):
            raise UserError(
                f"{file}: {line.strip()!r} names a folder of this machine, where others find nothing. Write "
                f"{word} ./FILE.gguf, the file beside it"
            )
