"""Loads a model from a local folder and quantises its linear layers, one decoder layer at a time.

The model runs on a few training rows. Each decoder layer is read in its float dtype just before it runs; while it runs,
the size of its linears' input channels is measured; then the linears are quantised and their float weights freed. The
output head follows. The whole float model is never in memory, and each layer is calibrated on the float outputs of the
ones before it. Embedding and norms stay in the float dtype, and so does what the rows don't reach. Where the sizes are
known from a run's training, nothing runs, and the weights are the same.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from huarizo.data.padding import Batch, PaddedBatch, pad
from huarizo.data.tokens import Example
from huarizo.errors import ModelError
from huarizo.machine import is_out_of_memory
from huarizo.model.architectures.registry import architecture_of
from huarizo.model.architectures.structure import Readers, as_linear, linears_in, readers_seen, shape_of, structure_of
from huarizo.model.attention import NAME as PACKED_ATTENTION
from huarizo.model.frozen.peaks import Peaks
from huarizo.model.frozen.storages import STORAGES, Storage
from huarizo.model.load import read_config
from huarizo.model.skeleton import config_of, empty_model
from huarizo.model.weights import check_weights, read_tensor, tensors_of, within_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel


BAR = 0.2
"""The largest relative error of a decoder layer's change to its input, and of logits, that int8 explains: it is below
.05 in models that are right, and near 1 where a model's code takes the stored weights for floats."""
CHECKED = 24  # tokens for the comparison of logits


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
    folder: Path, storage: str, dtype: torch.dtype, device: torch.device, calibration: Batch | Peaks
) -> "PreTrainedModel":
    """Load the frozen base on `device` with quantised linears, and packed attention where its architecture `packs`.

    storage: a name in `STORAGES`; dtype: of the activations and of all that is not quantised; calibration: a batch of
    training rows, packed where the architecture `packs`, else padded, or the peaks that were measured on them. The same
    ones give the same weights.

    Raises:
        MachineError: there is not enough memory for it.
        ModelError: the architecture is not supported; the weights are missing, broken, pickled, or don't match
            config.json; the peaks are those of another model.
    """
    from transformers import GenerationConfig

    read_config(folder)
    check_weights(folder)
    config = config_of(folder)
    if architecture_of(config).packs:
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


def _fill(model: "PreTrainedModel", weights: _Weights, stored: Storage, calibration: Batch | Peaks) -> None:
    """Load the weights of a model on torch's meta device and quantise it, from the embedding to the head."""
    structure = structure_of(model)
    _compute_buffers(model, weights.device)
    weights.fill(model, "", but=(f"{structure.layers}.", f"{structure.head}."))
    named = model.get_submodule(structure.layers).named_children()
    layers = {f"{structure.layers}.{number}.": layer for number, layer in named}
    if isinstance(calibration, Mapping):
        for prefix, layer in layers.items():
            weights.fill(layer, prefix)
            _quantise(layer, _within(prefix, calibration), stored)
        head = {paths: peaks for paths, peaks in calibration.items() if paths == (structure.head,)}
    else:
        calibration = calibration.to(weights.device)
        for prefix, layer in layers.items():
            _quantise_as_it_runs(layer, prefix, weights, stored, calibration)
        head = {(structure.head,): _peaks(_input_of_head(model, structure.head, calibration), calibration)}
    if f"{structure.head}.weight" not in weights.stored:
        model.tie_weights()
    weights.fill(model.get_submodule(structure.head), f"{structure.head}.")
    if isinstance(calibration, PaddedBatch):
        ids = calibration.input_ids[0, :CHECKED].tolist()
        few = pad([Example(ids, ids)]).to(weights.device)
        _quantise_if_right(model, head, stored, lambda: _run(model, few).logits)
    else:
        _quantise(model, head, stored)


def _compute_buffers(model: "PreTrainedModel", device: torch.device) -> None:
    """Compute the buffers of a model on torch's meta device, such as rope's frequencies, as Transformers does."""
    for path, buffer in list(model.named_buffers()):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, torch.empty_like(buffer, device=device))
    model.initialize_weights()  # the parameters, which have no values, stay so


def _within(prefix: str, peaks: Peaks) -> Peaks:
    """The peaks of the layers whose paths begin so, by the rest of these."""
    return {
        tuple(path.removeprefix(prefix) for path in paths): values
        for paths, values in peaks.items()
        if paths[0].startswith(prefix)
    }


def _quantise_as_it_runs(layer: nn.Module, prefix: str, weights: _Weights, stored: Storage, calibration: Batch) -> None:
    """Let a decoder layer load its weights before it runs first, and quantise its linears after that."""
    watch = ExitStack()
    seen: list[Sequence[Readers]] = []

    def before(*_: Any) -> None:
        hooks[0].remove()
        weights.fill(layer, prefix)
        seen.append(watch.enter_context(readers_seen(layer)))

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hooks[1].remove()
        watch.close()
        peaks = {tuple(group.paths): _peaks(group.x, calibration) for group in seen.pop()}
        if isinstance(calibration, PaddedBatch):
            x = args[0] if args else kwargs.get("hidden_states")
            _quantise_if_right(layer, peaks, stored, lambda: layer.forward(*args, **kwargs), output, x)
        else:
            _quantise(layer, peaks, stored)

    hooks = [layer.register_forward_pre_hook(before), layer.register_forward_hook(after, with_kwargs=True)]


class _HeadReached(BaseException):
    """Ends a forward pass before the head. args: the head's input."""


def _input_of_head(model: "PreTrainedModel", path: str, batch: Batch) -> torch.Tensor:
    """Run a model on rows up to its head, which may have no weights yet. Returns the head's input, [..., K]."""

    def reached(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        raise _HeadReached(args[0])

    hook = model.get_submodule(path).register_forward_pre_hook(reached)
    try:
        _run(model, batch)
    except _HeadReached as there:
        return there.args[0]
    finally:
        hook.remove()
    raise AssertionError(f"{type(model).__name__} has logits without its head {path}")


def _run(model: "PreTrainedModel", batch: Batch) -> Any:
    """The output of a causal model for a batch."""
    takes = inspect.signature(model.forward).parameters
    return model(**batch.model_inputs(), **({"use_cache": False} if "use_cache" in takes else {}))


def _peaks(x: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The largest |x_j| of each channel, without those of padding: [..., K] -> float32 [K]."""
    x_TK = x.detach().flatten(0, -2)
    if isinstance(batch, PaddedBatch) and len(x_TK) == batch.attention_mask.numel():
        x_TK = x_TK[batch.attention_mask.flatten().bool()]
    return x_TK.abs().amax(0).float()


def _quantise(module: nn.Module, peaks: Peaks, stored: Storage) -> None:
    """Replace the linears of `module` that have peaks with quantised layers."""
    for paths, values in peaks.items():
        linears = [as_linear(module.get_submodule(path)) for path in paths]
        kept = values.cpu()
        replacements = stored.quantise(linears, values.to(linears[0].weight.device))
        for path, replacement in zip(paths, replacements, strict=True):
            replacement.peaks = kept
            module.set_submodule(path, replacement)


def _quantise_if_right(
    module: nn.Module,
    peaks: Peaks,
    stored: Storage,
    run: Callable[[], Any],
    expected: Any = None,
    x: torch.Tensor | None = None,
) -> None:
    """As `_quantise`; but the linears stay in floats if `run` gives something else then, or fails.

    The code of some models reads the weight of a linear layer, or its dtype, beside running the layer.

    expected: what `run` returned before; by default it is run. x: the input that `run` adds something to.
    """
    expected = run() if expected is None else expected
    linears = {path: module.get_submodule(path) for paths in peaks for path in paths}
    _quantise(module, peaks, stored)
    try:
        right = _are_close(run(), expected, x)
    except Exception as error:  # anything that a model's code raises
        if is_out_of_memory(error):
            raise
        right = False
    if not right:
        for path, linear in linears.items():
            module.set_submodule(path, linear)


def _are_close(found: Any, expected: Any, x: torch.Tensor | None) -> bool:
    """Whether outputs, or the first of several, are the same but for the rounding of int8."""
    found, expected = (each[0] if isinstance(each, tuple | list) else each for each in (found, expected))
    change = expected - x if x is not None and x.shape == expected.shape else expected
    return bool((found - expected).float().norm() <= BAR * change.float().norm())
