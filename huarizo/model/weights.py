"""What a model folder's weight files hold is compared with what its config.json describes, by their headers alone.

Transformers gives random numbers to a weight that no file has, and ignores one that the model has no place for. Both
would train another model than the one that was given, so both are refused by name before a weight is read.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from huarizo.errors import ModelError, listed
from huarizo.hub.model_files import INDEX, WEIGHTS, lacking, weight_files

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
COMPUTED = ".rotary_emb.inv_freq"  # older conversions keep it; nothing reads it
FLOATS = ("F64", "F32", "F16", "BF16")
MOST_NAMED = 5


def tensors_of(folder: Path) -> dict[str, list[str]]:
    """A model's weight files, each with the names of the tensors in it.

    Raises:
        ModelError: a file is not there, is a pickle, or is not whole.
    """
    found: dict[str, list[str]] = {}
    if not ((folder / WEIGHTS).is_file() or (folder / INDEX).is_file()):
        raise ModelError(f"{folder}: {lacking(file.name for file in folder.iterdir())}")
    try:
        for file in weight_files(folder):
            with safe_open(folder / file, framework="pt") as opened:
                found[file] = [name for name in opened.keys() if not name.endswith(COMPUTED)]  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, LookupError, AttributeError) as error:
        raise ModelError(f"{folder}: the weights can't be loaded: {error}") from None
    return found


def check_weights(folder: Path) -> None:
    """Every weight of the model is in its files, in floats and in the shape that config.json says, and no other is.

    Raises:
        ModelError: naming the tensors and the files.
    """
    expected = {name: tuple(weight.shape) for name, weight in skeleton(folder).named_parameters()}
    files = tensors_of(folder)
    present = {name for names in files.values() for name in names}
    absent = [name for name in expected if name not in present]
    if absent:
        where = next(iter(files)) if len(files) == 1 else f"the {len(files)} files that {INDEX} names"
        raise ModelError(
            f"{folder}: the weights have no {_some(absent)} (looked for in {where}). Fetch or save the model again, "
            "whole, with `AutoModelForCausalLM` and `save_pretrained`"
        )
    problems = []
    for file, names in files.items():
        with safe_open(folder / file, framework="pt") as opened:
            for name in names:
                part = opened.get_slice(name)
                if problem := _problem(name, part.get_shape(), part.get_dtype(), expected):
                    problems.append(f"{file}: {name} {problem}")
    if problems:
        raise ModelError(f"{folder}: the weights are not those of its config.json:\n{listed(problems, MOST_NAMED)}")


def skeleton(folder: Path) -> Any:
    """The Llama that a folder's config.json describes, on torch's meta device: shapes without numbers.

    Raises:
        ModelError: no model can be made of it.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    try:
        config = LlamaConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            return LlamaForCausalLM(config)
    except Exception as error:  # whatever a broken configuration sets off
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{folder / 'config.json'}: no model can be made of it: {said}") from None


def _problem(name: str, shape: list[int], dtype: str, expected: dict[str, tuple[int, ...]]) -> str | None:
    """What is wrong with a tensor of a weight file, in words."""
    if name == HEAD and name not in expected:  # tied by config.json, and kept all the same
        name = EMBEDDING
    if name not in expected:
        return "has no place in that model"
    if tuple(shape) != expected[name]:
        return f"has the shape {list(shape)}, where config.json wants {list(expected[name])}"
    if dtype not in FLOATS:
        return f"is kept as {dtype}, so this base is quantised. Give the original one in floats"
    return None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
