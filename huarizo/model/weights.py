"""Compares the headers of a model folder's weight files with the model that its config.json describes.

Transformers initialises a missing weight at random and ignores one that the model has no place for. Either would train
another model than the given one, so both are refused by name before any weight is read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

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

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

COMPUTED = ".rotary_emb.inv_freq"  # in older conversions; nothing reads it
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FAULTS_OF_FILES = OSError, SafetensorError, PanicError
MOST_NAMED = 5
NO_ROOM = "there is not enough memory for this model. Close other programs or use a smaller model"


def tensors_of(folder: Path) -> dict[str, dict[str, Tensor]]:
    """A model's weight files, each with its tensors.

    Raises:
        ModelError: a file is missing, a pickle, or incomplete.
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
    """Read a tensor of a safetensors file in its stored dtype, onto the CPU or `device`.

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
    """Inside the block weight files are read: their faults become a ModelError; running out of memory passes through.

    faults: the exceptions that a broken file raises. The default, the system's and safetensors' own, is for blocks that
    do more than read.
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
    """Inside the block running out of memory becomes a MachineError, with `advice` appended; others pass through."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MachineError(f"{path}: {NO_ROOM}{advice}") from None


def check_weights(folder: Path) -> None:
    """Check that the files hold every weight of the model, as floats in the shape from config.json, and no other.

    Raises:
        ModelError: they don't; the message names the tensors and the files.
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
            f"{folder}: the weights have no {_some(absent)} (looked for in {where}). Fetch the model again, or "
            "save all of it with `AutoModelForCausalLM` and `save_pretrained`"
        )
    problems = []
    for file, tensors in files.items():
        for name, tensor in tensors.items():
            if problem := _problem(name, tensor, expected, architecture):
                problems.append(f"{file}: {name} {problem}")
    if problems:
        raise ModelError(f"{folder}: the weights don't match config.json:\n{listed(problems, MOST_NAMED)}")


def skeleton(folder: Path) -> "PreTrainedModel":
    """The model that a folder's config.json describes, on torch's meta device: shapes without values.

    Raises:
        ModelError: config.json describes no model that Transformers can make.
    """
    try:
        config = config_of(folder)
        with torch.device("meta"):
            return class_of(config)(config)
    except Exception as error:  # anything that a broken configuration causes
        raise ModelError(f"{folder / 'config.json'}: no model can be made from it: {first_line(error)}") from None


def config_of(folder: Path) -> "PretrainedConfig":
    """Transformers' configuration of a model folder, without dropout: the base is frozen, and only the adapter has
    dropout."""
    from transformers import AutoConfig

    return without_dropout(AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True))


def without_dropout(config: "PretrainedConfig") -> "PretrainedConfig":
    """Set every share of values, paths or layers that a configuration drops in training to 0, and return it."""
    for name, value in list(vars(config).items()):
        if "drop" in name and type(value) in (float, int) and value > 0:
            setattr(config, name, type(value)())
    for name in config.sub_configs:
        if (inner := getattr(config, name, None)) is not None:
            without_dropout(inner)
    return config


def class_of(config: "PretrainedConfig") -> "type[PreTrainedModel]":
    """Transformers' causal model class for this configuration."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return cast("type[PreTrainedModel]", MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])


def _problem(name: str, tensor: Tensor, expected: dict[str, tuple[int, ...]], architecture: Architecture) -> str | None:
    """What is wrong with a tensor of a weight file, as a message; None if nothing is."""
    if name == f"{architecture.head}.weight" and name not in expected:  # tied, but in the files all the same
        name = f"{architecture.embedding}.weight"
    if name not in expected:
        return "has no place in this model"
    if tuple(tensor.shape) != expected[name]:
        return f"has the shape {tensor.shape}, but config.json requires {list(expected[name])}"
    if tensor.dtype not in FLOATS:
        return f"is stored as {tensor.dtype}, so this base is quantised. Use the original float model"
    return None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
