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
from huarizo.model.merged import MergedWeights, merged_shards
from huarizo.results.target import check_folder
from huarizo.results.tuned import Tuned
from huarizo.results.turns import chat_template

GENERATION = "generation_config.json"


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
    """The base's, with the tokens at which a trained answer ends in front of its own."""
    file = tuned.base / GENERATION
    try:
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        own = settings.get("eos_token_id")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"{file}: can't be read as settings ({error}). Mend or remove it") from None
    settings.pop("_from_model_config", None)  # else Transformers may make them anew from config.json
    own = own if isinstance(own, list) else [own]
    stops = list(dict.fromkeys([*tuned.stop_ids, *(number for number in own if number is not None)]))
    return settings | ({"eos_token_id": stops} if stops else {})


def _tokenizer(tuned: Tuned) -> Any:
    """The result's tokenizer, whose chat template writes the prompts that the run was trained on."""
    encoder = tuned.encoder
    tokenizer = copy.deepcopy(encoder.tokenizer)
    bos = str(encoder.tokenizer.bos_token) if encoder.adds_bos and encoder.prompt.name != "chat" else ""
    tokenizer.chat_template = chat_template(encoder, bos) or tokenizer.chat_template
    return tokenizer
