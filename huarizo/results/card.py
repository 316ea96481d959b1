"""Model cards: what a run was trained on, how to load its result, and its licence.

The card in an adapter's folder is for local use. The one for the hub adds the front matter that the hub reads, the
base's licence and a few answers before and after; it names no local folder.
"""

import json
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import yaml
from huggingface_hub import try_to_load_from_cache

from huarizo.errors import UserError
from huarizo.hub.model_files import CARD, LICENCES
from huarizo.hub.quickstart import QUICKSTART
from huarizo.inference.samples import Sample, samples_from_text
from huarizo.recipe import Recipe, names_of
from huarizo.recipe_file import parse_yaml
from huarizo.results.gguf import is_adapter
from huarizo.results.report import MetricsRow, fenced, heldout_change
from huarizo.runs import Run
from huarizo.sandbox.reading import open_file, read_bytes

T = TypeVar("T")
What = Literal["adapter", "merged", "gguf"]
KIND = {"adapter": ("peft", "adapter"), "merged": ("transformers", "finetune"), "gguf": ("gguf", "quantized")}
"""library_name and base_model_relation in the hub's model cards."""
QUICKSTART_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
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


def public_name(name: str) -> str:
    """The public name of a model or data set: its hub id without the revision, or the last part of its path."""
    return hub_id_of(name) or re.sub(r"[^\w.+ -]", "_", Path(name).name)


def hub_id_of(name: str) -> str | None:
    """The hub id of a model or data set, without the revision; None if the name is a folder or file."""
    repo_id = QUICKSTART_BASE if name == QUICKSTART else name.partition("@")[0]
    return repo_id if HUB_ID.fullmatch(repo_id) and not Path(name).exists() else None


def adapter_card(recipe: Recipe, base: str, metrics: Sequence[MetricsRow]) -> str:
    """The adapter's README.md: what it was trained on and how to load it with stock PEFT."""
    return f"""---
library_name: peft
base_model: {json.dumps(base)}
tags: [lora, huarizo]
---
# LoRA adapter

{card_facts(recipe, base, _data_names(recipe, lambda name: name.rpartition("/")[2]), metrics)}
{peft_usage(base, "path/to/this/folder", bool(recipe.data.special_tokens))}

Trained with Huarizo.
"""


def _data_names(recipe: Recipe, name_of: Callable[[str], str]) -> str:
    return ", ".join(name_of(name) for name in names_of(recipe.data.train))


def card_facts(recipe: Recipe, base: str, data: str, metrics: Sequence[MetricsRow]) -> str:
    """Base, data, settings and held-out loss as a list in Markdown; `base` and `data` are the names to show."""
    change = heldout_change(metrics)
    loss = f"- held-out loss: {change[0]:.4f} before, {change[1]:.4f} after\n" if change else ""
    lora, training = recipe.lora, recipe.training
    return f"""- base model: `{base}`
- data: `{data}`, prompt format `{recipe.data.prompt.splitlines()[0].replace("`", "'")}`
- LoRA: r={lora.r}, alpha={lora.alpha:g}, dropout={lora.dropout:g} on {lora.target_modules}
- training: {training.epochs:g} epochs, {training.batch_size} rows a step, learning rate {training.learning_rate:g}
{loss}"""


def peft_usage(base: str, adapter: str, tokens: bool = False) -> str:
    """How to load an adapter with stock PEFT, as a Markdown code block. tokens: whether it has added tokens."""
    longer = f"""
tokenizer = AutoTokenizer.from_pretrained({json.dumps(adapter)})  # with the added tokens
if len(tokenizer) > base.config.vocab_size:
    base.resize_token_embeddings(len(tokenizer))"""
    return f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM{", AutoTokenizer" if tokens else ""}

base = AutoModelForCausalLM.from_pretrained({base!r}){longer if tokens else ""}
model = PeftModel.from_pretrained(base, {json.dumps(adapter)})
```"""


def hub_card(run: Run, recipe: Recipe, repo_id: str, what: What, ggufs: Sequence[Path]) -> str:
    """The model card: front matter that the hub reads, what the model was trained on, and how to load it."""
    hub_id, base, licence = hub_id_of(recipe.model), public_name(recipe.model), _licence(recipe.model)
    library, relation = KIND[what]
    front: dict[str, str | list[str]] = {"library_name": library}
    if hub_id:
        front |= {"base_model": hub_id, "base_model_relation": relation}
    front |= {"license": licence} if licence else {}
    front |= {"pipeline_tag": "text-generation", "tags": ["lora", "huarizo"]}
    data = _data_names(recipe, lambda name: name if name == QUICKSTART else public_name(name))
    metrics = _read(run.metrics, _metrics_from_text)
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
        _usage(what, hub_id or f"path/to/{base}", repo_id, ggufs, bool(recipe.data.special_tokens)),
        f"## Licence\n\nThe licence is {under} (`{base}`), whose terms apply to this one too.",
        "Trained with Huarizo.",
    ]
    return "\n\n".join(parts).encode("utf-8", "replace").decode() + "\n"


def _read(file: Path, parse: Callable[[str], list[T]]) -> list[T]:
    """The rows of a run's JSONL file; [] if there is no such file."""
    try:
        return parse(file.read_text(encoding="utf-8")) if file.is_file() else []
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: can't be read ({type(error).__name__}: {error}). Repair or remove it") from None


def _metrics_from_text(text: str) -> list[MetricsRow]:
    rows = [json.loads(line) for line in text.splitlines()]
    if not all(isinstance(row, dict) and isinstance(row.get("eval_loss", 0.0), float | int | None) for row in rows):
        raise ValueError("a line is not an object, or its eval_loss is not a number")
    return rows


def _sample_block(sample: Sample) -> str:
    texts = {"Prompt": sample.prompt, "Before": sample.before, "After": sample.after or ""}
    return "\n\n".join(f"{title}:\n\n{fenced(_shortened(text))}" for title, text in texts.items())


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_SAMPLE else text[:LONGEST_SAMPLE] + "…"


def _usage(what: What, base: str, repo_id: str, ggufs: Sequence[Path], tokens: bool) -> str:
    """How to load it: with PEFT, Transformers, or llama.cpp and Ollama. tokens: whether it has added tokens."""
    if what == "adapter":
        return peft_usage(base, repo_id, tokens)
    if what == "merged":
        return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo_id}")
model = AutoModelForCausalLM.from_pretrained("{repo_id}")
```"""
    whole = next((file.name for file in ggufs if not is_adapter(file)), None)
    if whole is None:
        name = shlex.quote(ggufs[0].name)
        return f"```sh\nhf download {repo_id} {name} --local-dir .\nllama-cli -m BASE.gguf --lora {name}\n```"
    return f"```sh\nllama-cli --hf-repo {repo_id} --hf-file {shlex.quote(whole)}\nollama run hf.co/{repo_id}\n```"


def _licence(model: str) -> str | None:
    """The base model's licence by the hub's name for it; None if this machine has no record of it."""
    if model == QUICKSTART:
        return "apache-2.0"
    if repo_id := hub_id_of(model):
        cached = try_to_load_from_cache(repo_id, CARD, revision=model.partition("@")[2] or None)
        return _licence_of_card(Path(cached)) if isinstance(cached, str) else None
    if said := _licence_of_card(Path(model) / CARD):
        return said
    texts = [file for pattern in LICENCES[:2] for file in sorted(Path(model).glob(pattern)) if file.is_file()]
    if not texts:
        return None
    with open_file(texts[0]) as file:
        start = file.read(5000).decode("utf-8", "replace")
    return next((name for name, words in LICENCE_TEXTS.items() if re.search(words, start, re.IGNORECASE)), "other")


def _licence_of_card(card: Path) -> str | None:
    try:
        front = re.match(r"---\r?\n(.*?)\n---", read_bytes(card)[:100_000].decode("utf-8"), re.DOTALL)
        said = parse_yaml(front[1])["license"] if front else None
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        return None
    return said if isinstance(said, str) and re.fullmatch(r"[a-z0-9.+-]{1,40}", said) else None
