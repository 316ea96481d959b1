"""Writes the merged model as an ordinary model folder: the base's float weights plus the adapter, and its settings."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors.torch import save_file

from huarizo.console import tracked
from huarizo.errors import ModelError
from huarizo.files import make_parent, require_space, whole_folder
from huarizo.hub.model_files import INDEX, LICENCES, WEIGHTS
from huarizo.inference.artifact import Tuned
from huarizo.model.merge import MergedWeights, merged_shards
from huarizo.results.chat_template import chat_template
from huarizo.results.overwrite import check_folder
from huarizo.sandbox.reading import read_json
from huarizo.wording import excerpt, first_line

GENERATION = "generation_config.json"
COUNTS = ("max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams", "num_return_sequences", "top_k")
NUMBERS = ("temperature", "top_p", "repetition_penalty")


def merge(tuned: Tuned, out: Path, force: bool = False, console: Console | None = None) -> Path:
    """Write the merged model as safetensors in the base's dtype, with tokenizer, template and generation settings.

    The folder is written whole or not at all. Only one file of weights is in memory at a time.

    Raises:
        UserError: `out` exists and `force` is not set, or it is not a merged model.
        ModelError: the adapter does not fit the base.
        MachineError: no space on the disk, or it is not writable.
    """
    check_folder(out, force, "config.json", spared=[tuned.base, tuned.adapter])
    weights = MergedWeights(tuned.base, tuned.adapter)
    require_space(out, sum((tuned.base / file).stat().st_size for file in weights.shards), "the merged model")
    make_parent(out)
    with whole_folder(out) as folder:
        places: dict[str, str] = {}
        size = 0
        for file, tensors in tracked(merged_shards(weights), "merging", console, len(weights.shards)):
            save_file(tensors, folder / file, metadata={"format": "pt"})
            places |= dict.fromkeys(tensors, file)
            size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            del tensors  # before the next ones are made
        if list(weights.shards) != [WEIGHTS]:
            index = {"metadata": {"total_size": size}, "weight_map": places}
            (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
        (folder / "config.json").write_text(json.dumps(weights.config, indent=2), encoding="utf-8")
        (folder / GENERATION).write_text(json.dumps(_generation_settings(tuned), indent=2), encoding="utf-8")
        _tokenizer(tuned).save_pretrained(str(folder))
        for pattern in LICENCES:
            for file in filter(Path.is_file, tuned.base.glob(pattern)):
                shutil.copy(file, folder)
    return out


def _generation_settings(tuned: Tuned) -> dict[str, Any]:
    """The base's generation settings, with the stop tokens of the training before its own.

    Raises:
        ModelError: Transformers would not load a model with these settings.
    """
    from transformers import GenerationConfig

    file = tuned.base / GENERATION
    try:
        settings = read_json(file) if file.is_file() else {}
        odd = next((name for name, value in settings.items() if not _is_setting(name, value)), None)
        if odd:
            raise ValueError(f"{odd} is {excerpt(json.dumps(settings[odd]))}")
        GenerationConfig.from_dict(settings)
    except Exception as error:  # Transformers raises many kinds for odd values
        raise ModelError(f"{file}: can't be read as settings ({first_line(error)}). Repair or remove it") from None
    settings.pop("_from_model_config", None)  # else Transformers may rebuild them from config.json
    own = settings.get("eos_token_id")
    own = own if isinstance(own, list) else [own]
    stops = list(dict.fromkeys([*tuned.stop_ids, *(number for number in own if number is not None)]))
    return settings | ({"eos_token_id": stops} if stops else {})


def _is_setting(name: str, value: object) -> bool:
    """Whether a known setting has a value of the right type. Transformers itself checks only a few."""
    if value is None:
        return True
    if name in COUNTS:
        return type(value) is int and value >= 0
    if name in NUMBERS:
        return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
    if name.endswith("_token_id"):
        return all(type(number) is int and number >= 0 for number in (value if isinstance(value, list) else [value]))
    return name != "do_sample" or type(value) is bool


def _tokenizer(tuned: Tuned) -> Any:
    """The result's tokenizer, with a chat template that writes the prompts of the training."""
    encoder = tuned.encoder
    tokenizer = copy.deepcopy(encoder.tokenizer)
    bos = str(encoder.tokenizer.bos_token) if encoder.adds_bos and encoder.prompt.name != "chat" else ""
    tokenizer.chat_template = chat_template(encoder, bos) or tokenizer.chat_template
    return tokenizer
