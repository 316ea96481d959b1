"""A run becomes an ordinary model folder: the base's float weights with the adapter added, and all beside them."""

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

    The folder appears whole or not at all; one file of weights at a time stands in memory.

    Raises:
        UserError: there is something at `out` already, and not `force`, or it is no merged model.
        ModelError: the adapter does not fit the base.
        MachineError: no space on the disk, or it can't be written.
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
    """The base's, with the tokens at which a trained answer ends in front of its own.

    Raises:
        ModelError: they are not such that Transformers would load the merged model.
    """
    from transformers import GenerationConfig

    file = tuned.base / GENERATION
    try:
        settings = read_json(file) if file.is_file() else {}
        odd = next((name for name, value in settings.items() if not _is_setting(name, value)), None)
        if odd:
            raise ValueError(f"{odd} is {excerpt(json.dumps(settings[odd]))}")
        GenerationConfig.from_dict(settings)
    except Exception as error:  # whatever Transformers says of odd values
        raise ModelError(f"{file}: can't be read as settings ({first_line(error)}). Mend or remove it") from None
    settings.pop("_from_model_config", None)  # else Transformers may make them anew from config.json
    own = settings.get("eos_token_id")
    own = own if isinstance(own, list) else [own]
    stops = list(dict.fromkeys([*tuned.stop_ids, *(number for number in own if number is not None)]))
    return settings | ({"eos_token_id": stops} if stops else {})


def _is_setting(name: str, value: Any) -> bool:
    """Whether a setting of a known name has a value of its kind; Transformers itself looks at few of them."""
    if value is None:
        return True
    if name in COUNTS:
        return type(value) is int and value >= 0
    if name in NUMBERS:
        return type(value) in (int, float) and value >= 0
    if name.endswith("_token_id"):
        return all(type(number) is int and number >= 0 for number in (value if isinstance(value, list) else [value]))
    return name != "do_sample" or type(value) is bool


def _tokenizer(tuned: Tuned) -> Any:
    """The result's tokenizer, whose chat template writes the prompts that the run was trained on."""
    encoder = tuned.encoder
    tokenizer = copy.deepcopy(encoder.tokenizer)
    bos = str(encoder.tokenizer.bos_token) if encoder.adds_bos and encoder.prompt.name != "chat" else ""
    tokenizer.chat_template = chat_template(encoder, bos) or tokenizer.chat_template
    return tokenizer
