"""What a model folder's weight files hold is compared with what its config.json describes, by their headers alone.

Transformers gives random numbers to a weight that no file has, and ignores one that the model has no place for. Both
would train another model than the one that was given, so both are refused by name before a weight is read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from huarizo.errors import MachineError, ModelError
from huarizo.hub import model_files
from huarizo.hub.model_files import INDEX, Tensor
from huarizo.machine import is_out_of_memory
from huarizo.model.architectures.architecture import Architecture
from huarizo.model.architectures.registry import architecture_of
from huarizo.sandbox.reading import PanicError, without_panics
from huarizo.wording import first_line, listed

COMPUTED = ".rotary_emb.inv_freq"  # older conversions keep it; nothing reads it
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FAULTS_OF_FILES = OSError, SafetensorError, PanicError
MOST_NAMED = 5
NO_ROOM = "there is not enough memory for this model. Close other programs or use a smaller model"


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
    with (
        within_memory(file),
        reading(file, Exception),
        safe_open(file, framework="pt", device=str(device or "cpu")) as opened,
    ):
        return opened.get_tensor(name)


@contextmanager
def reading(path: Path, faults: type[Exception] | tuple[type[Exception], ...] = FAULTS_OF_FILES) -> Iterator[None]:
    """Inside the block weight files are read: what is wrong with them becomes a ModelError, a lack of memory doesn't.

    faults: classes of what a reader raises of a broken file; those of the system and safetensors alone, where more is
    done than reading.
    """
    try:
        with without_panics():
            yield
    except faults as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(f"{path}: the weights can't be loaded: {first_line(error)}") from None


@contextmanager
def within_memory(path: Path, advice: str = "") -> Iterator[None]:
    """Inside the block a lack of memory becomes a MachineError, with advice behind the usual one; all else passes."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MachineError(f"{path}: {NO_ROOM}{advice}") from None


def check_weights(folder: Path) -> None:
    """Every weight of the model is in its files, in floats and in the shape that config.json says, and no other is.

    Raises:
        ModelError: naming the tensors and the files.
    """
    model = skeleton(folder)
    architecture = architecture_of(model.config, folder)
    expected = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
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
            if problem := _problem(name, tensor, expected, architecture):
                problems.append(f"{file}: {name} {problem}")
    if problems:
        raise ModelError(f"{folder}: the weights are not those of its config.json:\n{listed(problems, MOST_NAMED)}")


def skeleton(folder: Path) -> Any:
    """The model that a folder's config.json describes, on torch's meta device: shapes without numbers.

    Raises:
        ModelError: no model can be made of it.
    """
    try:
        config = config_of(folder)
        with torch.device("meta"):
            return class_of(config)(config)
    except Exception as error:  # whatever a broken configuration sets off
        raise ModelError(f"{folder / 'config.json'}: no model can be made of it: {first_line(error)}") from None


def config_of(folder: Path) -> Any:
    """Transformers' configuration of a model folder. Dropout in its attention has no say: the base is frozen, and what
    is dropped is the adapter's own business."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    config.attention_dropout = 0.0
    return config


def class_of(config: Any) -> Any:
    """Transformers' class of causal models with this configuration."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _problem(name: str, tensor: Tensor, expected: dict[str, tuple[int, ...]], architecture: Architecture) -> str | None:
    """What is wrong with a tensor of a weight file, in words."""
    if name == f"{architecture.head}.weight" and name not in expected:  # tied by config.json, and kept all the same
        name = f"{architecture.embedding}.weight"
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
