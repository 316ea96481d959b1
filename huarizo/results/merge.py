"""A run becomes an ordinary model folder: the base's float weights with the adapter added, and all beside them."""

import json
import shutil
from pathlib import Path

from rich.console import Console
from safetensors.torch import save_file

from huarizo.console import tracked
from huarizo.files import make_parent, require_space, whole_folder
from huarizo.hub.model_files import INDEX, WEIGHTS
from huarizo.model.merged import MergedWeights, merged_shards
from huarizo.results.target import check_folder
from huarizo.results.tuned import Tuned

LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


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
        if list(weights.shards) != [WEIGHTS]:
            index = {"metadata": {"total_size": size}, "weight_map": places}
            (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
        (folder / "config.json").write_text(json.dumps(weights.config, indent=2), encoding="utf-8")
        generation = tuned.base / "generation_config.json"
        settings = json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else {}
        settings["eos_token_id"] = tuned.stop_ids
        (folder / "generation_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
        tuned.encoder.tokenizer.save_pretrained(str(folder))
        for pattern in LICENCES:
            for file in tuned.base.glob(pattern):
                shutil.copy(file, folder)
    return out
