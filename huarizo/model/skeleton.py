"""The model that a config.json describes, on torch's meta device: shapes without values, made in milliseconds.

What must be known of a model before its weights are read is seen in it: names, shapes, sizes, the paths of its parts.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from huarizo.errors import ModelError
from huarizo.model.architectures.structure import Structure, has_experts, linears_in, shape_of, structure_of
from huarizo.wording import first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

NOISE = re.compile("drop|jitter")
"""In the names of shares in a configuration."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of a model, for estimates of memory. Weights are counted if they have two or more dimensions."""

    layers: int
    """Number of decoder layers."""
    hidden: int
    """Channels between the layers."""
    attention: int
    """Channels of the queries of one layer, at most."""
    inner: int
    """Channels of the widest input of a linear layer, and of the experts that a token is sent to."""
    in_layers: int
    """Weights in the linear layers of all decoder layers."""
    embedding: int
    """Weights of the token embedding."""
    head: int
    """Weights of the output head."""
    tied: bool
    """Whether the head shares the embedding's."""
    others: int
    """Weights elsewhere: experts, learnt positions, convolutions."""


def config_of(folder: Path) -> "PretrainedConfig":
    """Transformers' configuration of a model folder, without noise: the base is frozen, and only the adapter has
    dropout."""
    from transformers import AutoConfig

    return without_noise(AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True))


def without_noise(config: "PretrainedConfig") -> "PretrainedConfig":
    """Set every share of values, paths or layers that a configuration drops in training to 0, and the jitter of
    routers, and return it."""
    for name, value in list(vars(config).items()):
        if NOISE.search(name) and type(value) in (float, int) and value > 0:
            setattr(config, name, type(value)())
    for name in config.sub_configs:
        if (inner := getattr(config, name, None)) is not None:
            without_noise(inner)
    return config


def configuration(content: Mapping[str, Any]) -> "PretrainedConfig":
    """Transformers' configuration for the content of a config.json. What it raises for a broken one is of any kind."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[content["model_type"]].from_dict(_with_infinities(dict(content)))


def _with_infinities(value: Any) -> Any:
    """A value of a config.json, with the numbers that JSON lacks: Transformers writes {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {name: _with_infinities(inner) for name, inner in value.items()}
    return [_with_infinities(inner) for inner in value] if isinstance(value, list) else value


def largest(config: "PretrainedConfig", name: str) -> Any:
    """A number of a configuration, the largest where each layer has its own; None if there is none."""
    layers = config.per_layer_config if config.is_heterogeneous else (config,)
    return max((value for layer in layers if (value := getattr(layer, name, None)) is not None), default=None)


def class_of(config: "PretrainedConfig") -> "type[PreTrainedModel]":
    """Transformers' causal model class for this configuration."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return cast("type[PreTrainedModel]", MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])


def empty_model(config: "PretrainedConfig") -> "PreTrainedModel":
    """A new model on the meta device."""
    with torch.device("meta"):
        return class_of(config)(config)


def skeleton(folder: Path) -> "PreTrainedModel":
    """A new model of a folder's config.json, on the meta device.

    Raises:
        ModelError: config.json describes no model that Transformers can make.
    """
    try:
        return empty_model(config_of(folder))
    except Exception as error:  # anything that a broken configuration causes
        raise ModelError(f"{folder / 'config.json'}: no model can be made from it: {first_line(error)}") from None


class Seen(NamedTuple):
    """What is seen in a model before its weights are read."""

    model: "PreTrainedModel"
    """The model on the meta device. It is shared: don't change it."""
    structure: Structure
    sizes: Sizes


def seen_in(config: Mapping[str, Any], source: Path | str = "config.json") -> Seen:
    """What is seen in the model that the content of a config.json describes; made once for the same content.

    source: where it is from, for the message.

    Raises:
        ModelError: it describes no model that Transformers can make, or a part of the model can't be found.
    """
    try:
        return _seen(json.dumps(config, sort_keys=True, default=str))
    except ModelError:
        raise
    except Exception as error:  # anything that a broken configuration causes
        raise ModelError(f"{source}: no model can be made from it: {first_line(error)}") from None


def reason_for_floats(seen: Seen) -> str | None:
    """Why a model's weights can't be stored in another form than floats; None if they can."""
    if has_experts(seen.model.get_submodule(seen.structure.layers)):
        return "mixtures of experts are trained in float, because most experts are no linear layers"
    if getattr(seen.model.config, "rescale_every", 0):
        return f"{seen.model.config.model_type} is trained in float, because it rescales its weights while it runs"
    return None


@lru_cache(maxsize=4)
def _seen(text: str) -> Seen:
    model = empty_model(configuration(json.loads(text)))
    structure = structure_of(model)
    return Seen(model, structure, _sizes(model, structure))


def _sizes(model: "PreTrainedModel", structure: Structure) -> Sizes:
    config = model.config.get_text_config(decoder=True)
    layers = cast(torch.nn.ModuleList, model.get_submodule(structure.layers))
    linears = linears_in(layers)
    shapes = [shape_of(linear) for linear in linears.values()]
    vocabulary = (model.get_submodule(path).weight for path in (structure.embedding, structure.head))
    embedding, head = (cast(torch.Tensor, weight) for weight in vocabulary)
    counted = {id(linear.weight) for linear in linears.values()} | {id(embedding), id(head)}
    others = [weight for weight in model.parameters() if weight.dim() > 1 and id(weight) not in counted]
    heads = largest(config, "num_attention_heads") or 1
    experts = [weight.shape[1] * weight.shape[2] // config.hidden_size for weight in others if weight.dim() == 3]
    chosen = getattr(config, "num_experts_per_tok", None) or 0
    return Sizes(
        layers=len(layers),
        hidden=config.hidden_size,
        attention=heads * (largest(config, "head_dim") or config.hidden_size // heads),
        inner=max((channels for _, channels in shapes), default=config.hidden_size) + chosen * min(experts, default=0),
        in_layers=sum(outputs * inputs for outputs, inputs in shapes),
        embedding=embedding.numel(),
        head=head.numel(),
        tied=head is embedding,
        others=sum(weight.numel() for weight in others),
    )
