"""Loads a model from a local folder and quantises its linear layers, one decoder layer at a time.

The model runs on a few training rows. Each decoder layer is read in its float dtype just before it runs; while it runs,
the size of its linears' input channels is measured; then the linears are quantised and their float weights freed. The
output head follows. The whole float model is never in memory, and each layer is calibrated on the float outputs of the
ones before it. Embedding and norms stay in the float dtype, and so does what the rows don't reach.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from huarizo.data.packing import PackedBatch
from huarizo.model.architectures.structure import Readers, as_linear, readers_seen, structure_of
from huarizo.model.attention import NAME as PACKED_ATTENTION
from huarizo.model.frozen.storages import STORAGES, Storage
from huarizo.model.load import read_config
from huarizo.model.skeleton import config_of, empty_model
from huarizo.model.weights import check_weights, read_tensor, tensors_of, within_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Weights:
    """The tensors of a model folder by name, each read on demand."""

    def __init__(self, folder: Path, model: "PreTrainedModel", dtype: torch.dtype, device: torch.device) -> None:
        self.stored = {
            name: (folder / file, tensor.name)
            for file, tensors in tensors_of(folder, model).items()
            for name, tensor in tensors.items()
        }
        self.dtype, self.device = dtype, device

    def fill(self, module: nn.Module, prefix: str, but: tuple[str, ...] = ()) -> None:
        """Load the parameters and saved buffers of `module` from the tensors named prefix + name, where there are any.

        but: the beginnings of the names that are left as they are.
        """
        tensors = {}
        for name in module.state_dict():
            if prefix + name in self.stored and not name.startswith(but):
                tensor = read_tensor(*self.stored[prefix + name], self.device)
                tensors[name] = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
        module.load_state_dict(tensors, strict=False, assign=True)


@torch.no_grad()
def load_quantised_base(
    folder: Path, storage: str, dtype: torch.dtype, device: torch.device, calibration: PackedBatch
) -> "PreTrainedModel":
    """Load the frozen base on `device` with quantised linears and packed attention.

    storage: a name in `STORAGES`; dtype: of the activations and of all that is not quantised; calibration: a packed
    batch of training rows. The same rows give the same weights.

    Raises:
        MachineError: there is not enough memory for it.
        ModelError: the architecture is not supported; the weights are missing, broken, pickled, or don't match
            config.json.
    """
    from transformers import GenerationConfig

    read_config(folder)
    check_weights(folder)
    config = config_of(folder)
    config._attn_implementation = PACKED_ATTENTION
    config.use_cache = False
    config.dtype = dtype
    model = empty_model(config).eval()
    with within_memory(folder):
        _fill(model, _Weights(folder, model, dtype, device), STORAGES[storage], calibration)
    model.generation_config = GenerationConfig()  # as in load_base
    return model.requires_grad_(False)


def _fill(model: "PreTrainedModel", weights: _Weights, stored: Storage, calibration: PackedBatch) -> None:
    """Load the weights of a model on torch's meta device and quantise it, from the embedding to the head."""
    structure, calibration = structure_of(model), calibration.to(weights.device)
    _compute_buffers(model, weights.device)
    weights.fill(model, "", but=(f"{structure.layers}.", f"{structure.head}."))
    hooks: list[RemovableHandle] = []
    for number, layer in enumerate(model.get_submodule(structure.layers).children()):
        hooks += _quantise_as_it_runs(layer, f"{structure.layers}.{number}.", weights, stored)
    hidden = model.base_model(**calibration.model_inputs(), use_cache=False).last_hidden_state
    for hook in hooks:
        hook.remove()
    if f"{structure.head}.weight" not in weights.stored:
        model.tie_weights()
    weights.fill(model.get_submodule(structure.head), f"{structure.head}.")
    _quantise(model, [Readers(hidden, [structure.head])], stored)


def _compute_buffers(model: "PreTrainedModel", device: torch.device) -> None:
    """Compute the buffers of a model on torch's meta device, such as rope's frequencies, as Transformers does."""
    for path, buffer in list(model.named_buffers()):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, torch.empty_like(buffer, device=device))
    model.initialize_weights()  # the parameters, which have no values, stay so


def _quantise_as_it_runs(layer: nn.Module, prefix: str, weights: _Weights, stored: Storage) -> list[RemovableHandle]:
    """Let a decoder layer load its weights before it runs, and quantise its linears after it has run."""
    watch = ExitStack()
    seen: list[Sequence[Readers]] = []

    def before(*_: Any) -> None:
        weights.fill(layer, prefix)
        seen.append(watch.enter_context(readers_seen(layer)))

    def after(*_: Any) -> None:
        watch.close()
        _quantise(layer, seen.pop(), stored)

    return [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]


def _quantise(module: nn.Module, groups: Sequence[Readers], stored: Storage) -> None:
    """Replace the linears of `module` in each group with quantised layers."""
    for group in groups:
        linears = [as_linear(module.get_submodule(path)) for path in group.paths]
        peaks = group.x.detach().abs().flatten(0, -2).amax(0).float()
        for path, replacement in zip(group.paths, stored.quantise(linears, peaks), strict=True):
            module.set_submodule(path, replacement)
