"""Loads a model from a local folder and quantises its linear layers, one decoder layer at a time.

Each layer is read in its float dtype, a few training rows run through it to measure the size of its input channels, and
then its linears are quantised and their float weights freed; likewise the output head. The whole float model is never
in memory, and each layer is calibrated on the float outputs of the ones before it. Embedding and norms stay in the
float dtype.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from huarizo.data.packing import PackedBatch
from huarizo.model.architectures.registry import architecture_of
from huarizo.model.attention import NAME as PACKED_ATTENTION
from huarizo.model.frozen.storages import STORAGES, Storage
from huarizo.model.load import read_config
from huarizo.model.weights import check_weights, class_of, config_of, read_tensor, tensors_of, within_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Weights:
    """The tensors of a model folder by name, each read on demand."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.files = {name: folder / file for file, names in tensors_of(folder).items() for name in names}
        self.folder, self.dtype, self.device = folder, dtype, device

    def fill(self, module: nn.Module, prefix: str) -> None:
        """Load every parameter of `module` from the tensor named `prefix`.name."""
        tensors = {}
        for name, _ in module.named_parameters():
            full = f"{prefix}.{name}"
            tensors[name] = read_tensor(self.files[full], full, self.device).to(self.dtype)
        module.load_state_dict(tensors, assign=True)


@contextmanager
def _peaks(layer: nn.Module) -> Iterator[dict[nn.Module, torch.Tensor]]:
    """Collects the largest |x| of each input channel, float32 [K], of each linear of `layer` that runs in the block."""
    seen: dict[nn.Module, torch.Tensor] = {}

    def note(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen[module] = args[0].detach().abs().flatten(0, -2).amax(0).float()

    handles = [m.register_forward_pre_hook(note) for m in layer.modules() if isinstance(m, nn.Linear)]
    yield seen
    for handle in handles:
        handle.remove()


def _quantise(
    module: nn.Module, groups: Iterable[Sequence[str]], peaks: dict[nn.Module, torch.Tensor], stored: Storage
) -> None:
    """Replace a module's linears, named by their paths and grouped by their input, with quantised layers."""
    for names in groups:
        linears = [cast(nn.Linear, module.get_submodule(name)) for name in names]
        for name, replacement in zip(names, stored.quantise(linears, peaks[linears[0]]), strict=True):
            module.set_submodule(name, replacement)


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
    with torch.device("meta"):
        model = class_of(config)(config)
    with within_memory(folder):
        _fill(model, _Weights(folder, dtype, device), STORAGES[storage], calibration)
    model.generation_config = GenerationConfig()  # as in load_base
    return model.requires_grad_(False).eval()


def _fill(model: "PreTrainedModel", weights: _Weights, stored: Storage, calibration: PackedBatch) -> None:
    """Load the weights of a model on torch's meta device and quantise it, from the embedding to the head."""
    parts, device = architecture_of(model.config), weights.device
    rotary = type(model.get_submodule(parts.rotary_embedding))(model.config).to(device)
    model.set_submodule(parts.rotary_embedding, rotary)
    embedding, norm, head = (model.get_submodule(path) for path in (parts.embedding, parts.norm, parts.head))
    weights.fill(embedding, parts.embedding)
    weights.fill(norm, parts.norm)
    calibration = calibration.to(device)
    hidden = embedding(calibration.input_ids)
    positions = rotary(hidden, calibration.position_ids)
    for number, layer in enumerate(model.get_submodule(parts.layers).children()):
        weights.fill(layer, f"{parts.layers}.{number}")
        with _peaks(layer) as peaks:
            hidden = layer(hidden, position_embeddings=positions, cu_seqlens=calibration.cu_seqlens)
        _quantise(layer, parts.shared_inputs, peaks, stored)
    if f"{parts.head}.weight" in weights.files:
        weights.fill(head, parts.head)
    else:
        model.tie_weights()
    with _peaks(head) as peaks:
        head(norm(hidden))
    _quantise(model, [[parts.head]], peaks, stored)
