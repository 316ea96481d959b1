"""What a model folder's weight files hold is compared with what its config.json describes, by their headers alone.

Transformers gives random numbers to a weight that no file has, and ignores one that the model has no place for. Both
would train another model than the one that was given, so both are refused by name before a weight is read.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from huarizo.errors import MachineError, ModelError
from huarizo.hub import model_files
from huarizo.hub.model_files import INDEX, Tensor
from huarizo.machine import is_out_of_memory
from huarizo.sandbox.reading import without_panics
from huarizo.wording import first_line, listed

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
COMPUTED = ".rotary_emb.inv_freq"  # older conversions keep it; nothing reads it
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MOST_NAMED = 5
NO_ROOM = (
    "there is not enough memory for this model. Close other programs, use a smaller model, or train with precision=int8"
)


def tensors_of(folder: Path) -> dict[str, dict[str, Tensor]]:
    """A model's weight files, each with the tensors in it.

    Raises:
        ModelError: a file is not there, is a pickle, or is not whole.
    """
    try:
        found = model_files.tensors_of(folder)
    except ValueError as error:
        raise ModelError(f"{folder}: {error}") from None
    return {
        file: {name: tensor for name, tensor in tensors.items() if not name.endswith(COMPUTED)}
        for file, tensors in found.items()
    }


def read_tensor(file: Path, name: str, device: torch.device | None = None) -> torch.Tensor:
    """A tensor of a safetensors file in the dtype that it is kept in, on the CPU or `device`.

    Raises:
        ModelError: the file can't be read.
        MachineError: there is no memory for the tensor.
    """
    try:
        with without_panics(), safe_open(file, framework="pt", device=str(device or "cpu")) as opened:
            return opened.get_tensor(name)
    except Exception as error:  # whatever a broken file sets off
        raise unloadable(file, error) from None


def unloadable(path: Path, error: Exception) -> ModelError | MachineError:
    """What a library says of weights that it can't load, in words."""
    if is_out_of_memory(error):
        return MachineError(f"{path}: {NO_ROOM}")
    return ModelError(f"{path}: the weights can't be loaded: {first_line(error)}")


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
    for file, tensors in files.items():
        for name, tensor in tensors.items():
            if problem := _problem(name, tensor, expected):
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
        raise ModelError(f"{folder / 'config.json'}: no model can be made of it: {first_line(error)}") from None


def _problem(name: str, tensor: Tensor, expected: dict[str, tuple[int, ...]]) -> str | None:
    """What is wrong with a tensor of a weight file, in words."""
    if name == HEAD and name not in expected:  # tied by config.json, and kept all the same
        name = EMBEDDING
    if name not in expected:
        return "has no place in that model"
    if tuple(tensor.shape) != expected[name]:
        return f"has the shape {tensor.shape}, where config.json wants {list(expected[name])}"
    if tensor.dtype not in FLOATS:
        return f"is kept as {tensor.dtype}, so this base is quantised. Give the original one in floats"
    return None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
