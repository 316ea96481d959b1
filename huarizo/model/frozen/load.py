"""Loads a model from a local folder and quantises its linear layers, one decoder layer at a time.

The model runs on a few training rows. Each decoder layer is read in its float dtype just before it runs; while it runs,
the size of its linears' input channels is measured; then the linears are quantised and their float weights freed. The
output head follows. The whole float model is never in memory, and each layer is calibrated on the float outputs of the
ones before it. Embedding and norms stay in the float dtype, and so does what the rows don't reach. Where the sizes are
known from a run's training, nothing runs, and the weights are the same.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from huarizo.data.packing import PackedBatch
from huarizo.errors import ModelError
from huarizo.model.architectures.structure import Readers, as_linear, linears_in, readers_seen, shape_of, structure_of
from huarizo.model.attention import NAME as PACKED_ATTENTION
from huarizo.model.frozen.peaks import Peaks
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
    folder: Path, storage: str, dtype: torch.dtype, device: torch.device, calibration: PackedBatch | Peaks
) -> "PreTrainedModel":
    """Load the frozen base on `device` with quantised linears and packed attention.

    storage: a name in `STORAGES`; dtype: of the activations and of all that is not quantised; calibration: a packed
    batch of training rows, or the peaks that were measured on them. The same ones give the same weights.

    Raises:
        MachineError: there is not enough memory for it.
        ModelError: the architecture is not supported; the weights are missing, broken, pickled, or don't match
            config.json; the peaks are those of another model.
    """
    from transformers import GenerationConfig

    read_config(folder)
    check_weights(folder)
    config = config_of(folder)
    config._attn_implementation = PACKED_ATTENTION
    config.use_cache = False
    config.dtype = dtype
    model = empty_model(config).eval()
    if isinstance(calibration, Mapping) and (odd := next(_strange(calibration, model), None)):
        raise ModelError(f"{folder}: the run's calibration is not for this model: {odd}. Use --precision float")
    with within_memory(folder):
        _fill(model, _Weights(folder, model, dtype, device), STORAGES[storage], calibration)
    model.generation_config = GenerationConfig()  # as in load_base
    return model.requires_grad_(False)


def _strange(peaks: Peaks, model: nn.Module) -> Iterator[str]:
    """The layers with peaks that the model doesn't have, or has in another size."""
    linears = linears_in(model)
    for paths, values in peaks.items():
        yield from (path for path in paths if path not in linears or (shape_of(linears[path])[1],) != values.shape)


def _fill(model: "PreTrainedModel", weights: _Weights, stored: Storage, calibration: PackedBatch | Peaks) -> None:
    """Load the weights of a model on torch's meta device and quantise it, from the embedding to the head."""
    structure = structure_of(model)
    _compute_buffers(model, weights.device)
    weights.fill(model, "", but=(f"{structure.layers}.", f"{structure.head}."))
    layers = model.get_submodule(structure.layers).named_children()
    by_prefix = {f"{structure.layers}.{number}.": layer for number, layer in layers}
    if isinstance(calibration, Mapping):
        for prefix, layer in by_prefix.items():
            weights.fill(layer, prefix)
            _quantise(layer, _within(prefix, calibration), stored)
        head = {paths: peaks for paths, peaks in calibration.items() if paths == (structure.head,)}
    else:
        head = {(structure.head,): _fill_as_they_run(model, by_prefix, weights, stored, calibration)}
    if f"{structure.head}.weight" not in weights.stored:
        model.tie_weights()
    weights.fill(model.get_submodule(structure.head), f"{structure.head}.")
    _quantise(model, head, stored)


def _within(prefix: str, peaks: Peaks) -> Peaks:
    """The peaks of the layers whose paths begin so, by the rest of these."""
    return {
        tuple(path.removeprefix(prefix) for path in paths): values
        for paths, values in peaks.items()
        if paths[0].startswith(prefix)
    }


def _fill_as_they_run(
    model: "PreTrainedModel",
    layers: Mapping[str, nn.Module],
    weights: _Weights,
    stored: Storage,
    calibration: PackedBatch,
) -> torch.Tensor:
    """Load and quantise decoder layers while the model runs on rows. Returns the peaks of the head's input.

    layers: by the prefix of their weights' names.
    """
    hooks: list[RemovableHandle] = []
    for prefix, layer in layers.items():
        hooks += _quantise_as_it_runs(layer, prefix, weights, stored)
    inputs = calibration.to(weights.device).model_inputs()
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
    for hook in hooks:
        hook.remove()
    return _peaks(hidden)


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
        _quantise(layer, {tuple(group.paths): _peaks(group.x) for group in seen.pop()}, stored)

    return [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]


def _peaks(x: torch.Tensor) -> torch.Tensor:
    """The largest |x_j| of each channel: [..., K] -> float32 [K]."""
    return x.detach().abs().flatten(0, -2).amax(0).float()


def _quantise(module: nn.Module, peaks: Peaks, stored: Storage) -> None:
    """Replace the linears of `module` that have peaks with quantised layers."""
    for paths, values in peaks.items():
        linears = [as_linear(module.get_submodule(path)) for path in paths]
        kept = values.cpu()
        replacements = stored.quantise(linears, values.to(linears[0].weight.device))
        for path, replacement in zip(paths, replacements, strict=True):
            replacement.peaks = kept
            module.set_submodule(path, replacement)
