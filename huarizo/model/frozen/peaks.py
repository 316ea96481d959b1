"""The peaks that a base was quantised with, kept in a file beside the run.

A linear layer is quantised by the largest |x_j| of each of its input channels j, which are measured on training rows.
With the same peaks a base gets the same weights again, without rows and without running it: a model answers with the
weights that it was trained with, wherever it is loaded.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from huarizo.errors import ModelError
from huarizo.files import write_whole
from huarizo.model.frozen.linear import FrozenLinear
from huarizo.sandbox.reading import without_panics
from huarizo.wording import first_line

Peaks = Mapping[tuple[str, ...], torch.Tensor]
"""The paths of linear layers that share one input -> the peaks of its channels, float32 [K]."""


def peaks_of(model: nn.Module) -> Peaks:
    """The peaks that the layers of a base were quantised with. Their paths are the base's own, inside any LoRA."""
    groups: dict[int, tuple[list[str], torch.Tensor]] = {}
    for path, module in model.named_modules():
        if isinstance(module, FrozenLinear) and module.peaks is not None:
            groups.setdefault(id(module.peaks), ([], module.peaks))[0].append(path.removesuffix(".base_layer"))
    return {tuple(paths): peaks for paths, peaks in groups.values()}


def write_peaks(path: Path, peaks: Peaks) -> None:
    """Write peaks to a safetensors file, in one step. A tensor's name lists the paths of its layers.

    Raises:
        MachineError: the disk is full or can't be written.
    """
    write_whole(path, save({",".join(paths): values for paths, values in peaks.items()}))


def read_peaks(path: Path) -> Peaks:
    """Read what `write_peaks` has written.

    Raises:
        ModelError: the file is missing or broken.
    """
    try:
        with without_panics():
            tensors = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{path}: can't be read: {first_line(error)}. Load the base in --precision float") from None
    return {tuple(name.split(",")): values.float() for name, values in tensors.items()}
