"""Compares the headers of a model folder's weight files with the model that its config.json describes.

Transformers initialises a missing weight at random and ignores one that the model has no place for. Either would train
another model than the given one, so both are refused by name before any weight is read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from huarizo.errors import MachineError, ModelError
from huarizo.hub import model_files
from huarizo.hub.model_files import INDEX, Tensor
from huarizo.machine import is_out_of_memory
from huarizo.model.names import places_of
from huarizo.model.skeleton import skeleton
from huarizo.sandbox.reading import PanicError, without_panics
from huarizo.wording import first_line, listed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FAULTS_OF_FILES = OSError, SafetensorError, PanicError
MOST_NAMED = 5
NO_ROOM = "there is not enough memory for this model. Close other programs or use a smaller model"


class Stored(NamedTuple):
    """A tensor of a weight file, by the file's header; `dtype` is F32, BF16 and so on."""

    shape: list[int]
    dtype: str
    name: str
    """Its name in the file."""
    part_of: str | None
    """The model's tensor that Transformers makes of it and others; None if it is that of the model as it stands."""


def tensors_of(folder: Path, model: "PreTrainedModel") -> dict[str, dict[str, Stored]]:
    """The weight files of a model's folder, each with its tensors by their names in the model, and parts of tensors by
    their own. What Transformers ignores on loading, such as masks in old files, is left out.

    Raises:
        ModelError: a file is missing, a pickle, or incomplete.
    """
    headers = _headers(folder)
    places = places_of((name for tensors in headers.values() for name in tensors), model)
    files: dict[str, dict[str, Stored]] = {}
    for file, tensors in headers.items():
        files[file] = {}
        for name, tensor in tensors.items():
            if place := places.get(name):
                key, part_of = (place.name, None) if place.whole else (name, place.name)
                files[file][key] = Stored(tensor.shape, tensor.dtype, name, part_of)
    return files


def count_tensors(folder: Path) -> int:
    """The number of tensors in a model's weight files.

    Raises:
        ModelError: as `tensors_of`.
    """
    return sum(map(len, _headers(folder).values()))


def _headers(folder: Path) -> dict[str, dict[str, Tensor]]:
    try:
        return model_files.tensors_of(folder)
    except ValueError as error:
        raise ModelError(f"{folder}: {error}") from None


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
    expected = model.state_dict()
    files = tensors_of(folder, model)
    present = {tensor.part_of or name for tensors in files.values() for name, tensor in tensors.items()}
    absent = [name for name, _ in model.named_parameters() if name not in present]
    if absent:
        where = next(iter(files)) if len(files) == 1 else f"the {len(files)} files that {INDEX} names"
        raise ModelError(
            f"{folder}: the weights have no {_some(absent)} (looked for in {where}). Fetch the model again, or "
            "save all of it with `AutoModelForCausalLM` and `save_pretrained`"
        )
    problems = []
    for file, tensors in files.items():
        for name, tensor in tensors.items():
            if problem := _problem(tensor, expected.get(tensor.part_of or name)):
                problems.append(f"{file}: {name} {problem}")
    if problems:
        raise ModelError(f"{folder}: the weights don't match config.json:\n{listed(problems, MOST_NAMED)}")


def _problem(tensor: Stored, expected: torch.Tensor | None) -> str | None:
    """What is wrong with a tensor of a weight file, as a message; None if nothing is. expected: the one in the model,
    None if it has no place there; of a tied head, which may be in the files all the same, the embedding."""
    if expected is None:
        return "has no place in this model"
    if tensor.part_of is None and tensor.shape != list(expected.shape):
        return f"has the shape {tensor.shape}, but config.json requires {list(expected.shape)}"
    if tensor.dtype not in FLOATS and expected.is_floating_point():
        return f"is stored as {tensor.dtype}, so this base is quantised. Use the original float model"
    return None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
