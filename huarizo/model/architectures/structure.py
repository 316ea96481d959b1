"""Finds the parts of a causal model of Transformers by looking at it: embedding, decoder layers, head, linear layers.

No architecture is named here. A model on torch's meta device is enough, but for the inputs that linear layers share,
which are seen while a decoder layer runs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from huarizo.errors import ModelError
from huarizo.model.frozen.linear import FrozenLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LINEAR = (nn.Linear, Conv1D, FrozenLinear)
"""Layers that compute x W' + b: torch's, GPT-2's, whose weight is W', and those that are not stored in floats."""


@dataclass(frozen=True, kw_only=True)
class Structure:
    """The paths of a model's parts."""

    embedding: str
    """Of the token embedding."""
    layers: str
    """Of the list of decoder layers."""
    head: str
    """Of the output head."""

    @property
    def vocabulary_layers(self) -> tuple[str, str]:
        """Last parts of the paths of the embedding and the head, which have a row for each token."""
        return self.embedding.rpartition(".")[2], self.head.rpartition(".")[2]


def structure_of(model: "PreTrainedModel") -> Structure:
    """The paths of a causal model's parts, whatever its layers are stored in or wrapped by.

    Raises:
        ModelError: a part can't be found.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    embedding, head = paths.get(id(model.get_input_embeddings())), paths.get(id(model.get_output_embeddings()))
    config = model.config.get_text_config(decoder=True)
    count = config.num_hidden_layers  # of attentions, where a layer has two: then `num_layers` counts the layers
    counts = count, getattr(config, "num_layers", count)
    lists = {
        path: sum(1 for _ in module.modules())
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) in counts
    }
    layers = max(lists, key=lists.__getitem__, default=None)  # lists of heads or experts within a layer are smaller
    for part, path in (("token embedding", embedding), ("output head", head), (f"list of {count} layers", layers)):
        if path is None:
            raise ModelError(f"{model.name_or_path or model.config.model_type}: no {part} is found in this model")
    assert embedding is not None and head is not None and layers is not None
    return Structure(embedding=embedding, layers=layers, head=head)


def has_experts(layers: nn.Module) -> bool:
    """Whether decoder layers send each token to a few of several experts. Transformers' names say so."""
    return any("expert" in part or "moe" in part for path, _ in layers.named_modules() for part in path.split("."))


def linears_in(module: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a module by their paths, in order of appearance."""
    return {path: found for path, found in module.named_modules() if isinstance(found, LINEAR) and not _is_more(found)}


def _is_more(module: nn.Module) -> bool:
    """Whether an nn.Linear has something else to compute with its weight, such as a router: then it doesn't make of
    [1, 1, K] an output of [1, 1, N]."""
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return False
    empty = {name: torch.empty_like(weight, device="meta") for name, weight in module.named_parameters()}
    x = torch.empty(1, 1, module.in_features, device="meta", dtype=module.weight.dtype)
    try:
        y = torch.func.functional_call(module, empty, x)
    except Exception:  # anything that such a layer's code raises
        return True
    return not isinstance(y, torch.Tensor) or y.shape != (1, 1, module.out_features)


def shape_of(linear: Any) -> tuple[int, int]:  # linear: any of LINEAR
    """(N, K), the output and input channels of a linear layer."""
    if isinstance(linear, Conv1D):
        return linear.nf, linear.nx
    return linear.out_features, linear.in_features


def as_linear(linear: nn.Module) -> nn.Linear:
    """An nn.Linear with the weight [N, K] and bias of a linear layer in floats, and no copy of them."""
    if isinstance(linear, nn.Linear):
        return linear
    assert isinstance(linear, Conv1D)
    plain = nn.Linear(linear.nx, linear.nf, device="meta")
    plain.weight = nn.Parameter(linear.weight.detach().t(), requires_grad=False)
    plain.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
    return plain


@dataclass
class Readers:
    """Linear layers that read the same input."""

    x: torch.Tensor
    """The input, [..., K]."""
    paths: list[str] = field(default_factory=list)


@contextmanager
def readers_seen(module: nn.Module) -> Iterator[list[Readers]]:
    """Collects the linear layers of `module` that run in the block, grouped by their input, in the order of running.

    The inputs are kept, so that no memory is used twice: a tensor is the same if it is the same memory.
    """
    seen: dict[tuple[int, ...], Readers] = {}
    groups: list[Readers] = []

    def note(path: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0]
        key = (x.data_ptr(), x.numel(), x.shape[-1], x._version)
        if key not in seen:
            groups.append(seen.setdefault(key, Readers(x)))
        if path not in seen[key].paths:
            seen[key].paths.append(path)

    handles = [linear.register_forward_pre_hook(partial(note, path)) for path, linear in linears_in(module).items()]
    try:
        yield groups
    finally:
        for handle in handles:
            handle.remove()
