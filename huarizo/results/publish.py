"""What of a run goes to the hub: its adapter, its merged model or its GGUF files, with a model card.

In goes a run, out comes the list of all that would be sent, to be shown before anything is. Only files on a list are
taken, and none of them may tell the folders of the machine that they come from.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import try_to_load_from_cache

from huarizo.errors import ModelError, UserError
from huarizo.hub.model_files import INDEX, broken
from huarizo.hub.names import QUICKSTART
from huarizo.hub.upload import full_name, upload
from huarizo.model.adapter import CONFIG, WEIGHTS, check_adapter
from huarizo.recipe import Recipe
from huarizo.results.merge import LICENCES
from huarizo.results.report import Sample, card_facts, peft_usage, samples_from_text
from huarizo.runs import Run

What = Literal["adapter", "merged", "gguf"]
CARD = "README.md"
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
KIND = {"adapter": ("peft", "adapter"), "merged": ("transformers", "finetune"), "gguf": ("gguf", "quantized")}
"""library_name and base_model_relation, as the hub's model cards have them."""
QUICKSTART_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
LOCAL_PATH = re.compile(r"/|~|\\\\|[A-Za-z]:[\\/]|file:")
VOCABULARY = ("model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder")
"""Parts of tokenizer.json whose texts are tokens and patterns, which may begin as a path does."""
TOKENS = re.compile(r"content|chat_template|.*_tokens?")
LICENCE_TEXTS = {
    "apache-2.0": r"Apache License\s+Version 2\.0",
    "mit": r"MIT License|Permission is hereby granted, free of charge",
    "llama2": r"LLAMA 2 COMMUNITY LICENSE",
    "llama3": r"META LLAMA 3 COMMUNITY LICENSE",
    "llama3.1": r"LLAMA 3\.1 COMMUNITY LICENSE",
    "llama3.2": r"LLAMA 3\.2 COMMUNITY LICENSE",
    "llama3.3": r"LLAMA 3\.3 COMMUNITY LICENSE",
}
SAMPLES, LONGEST_SAMPLE = 3, 1500  # samples in a card; characters of a prompt or answer
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
        UserError: there is nothing of that kind yet, a file leads out of the run's folder or tells a local path.
        ModelError: the adapter or the merged model is not whole.
    """
    recipe = run.recipe()
    found = _found(run, what)
    base = public_name(recipe.model)
    files: dict[str, Path | bytes] = {f.name: _without_paths(f, base) if f.suffix == ".json" else f for f in found}
    if "Modelfile" in files:
        _check_modelfile(run.path / "Modelfile")
    ggufs = [name for name in files if name.endswith(".gguf")]
    files[CARD] = _card(run, recipe, repo_id if "/" in repo_id else OWNER + repo_id, what, ggufs).encode()
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


def public_name(name: str) -> str:
    """A model or data set as others may know it: its hub id without the revision, or the last part of its path."""
    return _hub_id(name) or re.sub(r"[^\w.+ -]", "_", Path(name).name)


def _hub_id(name: str) -> str | None:
    repo_id = QUICKSTART_BASE if name == QUICKSTART else name.partition("@")[0]
    return repo_id if HUB_ID.fullmatch(repo_id) and not Path(name).exists() else None


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


def _card(run: Run, recipe: Recipe, repo_id: str, what: What, ggufs: list[str]) -> str:
    """The model card: front matter that the hub reads, what the model was trained on, and how it is loaded."""
    hub_id, base, licence = _hub_id(recipe.model), public_name(recipe.model), _licence(recipe.model)
    library, relation = KIND[what]
    front: dict[str, Any] = {"library_name": library}
    if hub_id:
        front |= {"base_model": hub_id, "base_model_relation": relation}
    front |= {"license": licence} if licence else {}
    front |= {"pipeline_tag": "text-generation", "tags": ["lora", "huarizo"]}
    data = recipe.data.train if recipe.data.train == QUICKSTART else public_name(recipe.data.train)
    metrics = _read(run.metrics, lambda text: [json.loads(line) for line in text.splitlines()])
    samples = [sample for sample in _read(run.samples, samples_from_text) if sample.after is not None][:SAMPLES]
    name = repo_id.split("/")[1]
    title = {"adapter": "LoRA adapter", "merged": "fine-tuned model", "gguf": "fine-tuned model in GGUF"}[what]
    under = f"{licence}, as its base model" if licence and licence != "other" else "that of its base model"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n# {name}: {title}",
        card_facts(recipe, base, data, metrics).rstrip(),
        *(["## Before and after training"] if samples else []),
        *(_sample_block(sample) for sample in samples),
        "## Use",
        _usage(what, hub_id or f"path/to/{base}", repo_id, ggufs),
        f"## Licence\n\nThe licence is {under} (`{base}`), whose terms apply to this one too.",
        "Trained with Huarizo.",
    ]
    return "\n\n".join(parts).encode("utf-8", "replace").decode() + "\n"


def _read(file: Path, parse: Callable[[str], list[Any]]) -> list[Any]:
    """The rows of a run's JSONL file; none where the run wrote none."""
    try:
        return parse(file.read_text(encoding="utf-8")) if file.is_file() else []
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{file}: can't be read ({type(error).__name__}: {error}). Mend or remove it") from None


def _sample_block(sample: Sample) -> str:
    texts = {"Prompt": sample.prompt, "Before": sample.before, "After": sample.after or ""}
    return "\n\n".join(f"{title}:\n\n{_fenced(text)}" for title, text in texts.items())


def _fenced(text: str) -> str:
    """A text as a code block that nothing in the text can end: its fence is longer than any run of backticks in it."""
    text = text if len(text) <= LONGEST_SAMPLE else text[:LONGEST_SAMPLE] + "…"
    text = re.sub(r"[^\S\n]|[\x00-\x08\x0e-\x1f\x7f]", " ", text)
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall(r"`+", text)), 3)
    return f"{fence}text\n{text}\n{fence}"


def _usage(what: What, base: str, repo_id: str, ggufs: list[str]) -> str:
    """How it is loaded: with PEFT, with Transformers, or in llama.cpp and Ollama."""
    if what == "adapter":
        return peft_usage(base, repo_id)
    if what == "merged":
        return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo_id}")
model = AutoModelForCausalLM.from_pretrained("{repo_id}")
```"""
    file = next((name for name in ggufs if not name.endswith("-adapter.gguf")), None)
    if file is None:
        return (
            f"```sh\nhf download {repo_id} '{ggufs[0]}' --local-dir .\nllama-cli -m BASE.gguf --lora '{ggufs[0]}'\n```"
        )
    return f"```sh\nllama-cli --hf-repo {repo_id} --hf-file '{file}'\nollama run hf.co/{repo_id}\n```"


def _licence(model: str) -> str | None:
    """The base model's licence as the hub names it, where that is known on this machine."""
    if model == QUICKSTART:
        return "apache-2.0"
    if repo_id := _hub_id(model):
        cached = try_to_load_from_cache(repo_id, CARD, revision=model.partition("@")[2] or None)
        return _licence_of_card(Path(cached)) if isinstance(cached, str) else None
    if said := _licence_of_card(Path(model) / CARD):
        return said
    texts = [file for pattern in LICENCES[:2] for file in sorted(Path(model).glob(pattern)) if file.is_file()]
    if not texts:
        return None
    start = texts[0].read_bytes()[:5000].decode("utf-8", "replace")
    return next((name for name, words in LICENCE_TEXTS.items() if re.search(words, start, re.IGNORECASE)), "other")


def _licence_of_card(card: Path) -> str | None:
    try:
        front = re.match(r"---\r?\n(.*?)\n---", card.read_bytes()[:100_000].decode("utf-8"), re.DOTALL)
        said = yaml.safe_load(front[1])["license"] if front else None
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        return None
    return said if isinstance(said, str) and re.fullmatch(r"[a-z0-9.+-]{1,40}", said) else None
