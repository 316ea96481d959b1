"""Which linear layers get a LoRA: names for PEFT's `target_modules`, and those that PEFT has no LoRA for.

PEFT matches the end of a path. In state space models it refuses layers whose weights their kernels read past it, and in
some mixtures of experts it takes the names of an MLP's layers for the experts' weights, which are no linear layers.
Seen with peft 0.21.2; tests/model/test_targets.py fails when that moves.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from huarizo.model.architectures.structure import linears_in, structure_of
from huarizo.model.skeleton import seen_in
from huarizo.recipe import LoraRecipe

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

ALL = "all-linear"


def linear_names(model: "nn.Module") -> list[str]:
    """Last parts of the names of the model's linear layers, such as q_proj, in order of appearance."""
    return list(dict.fromkeys(path.rpartition(".")[2] for path in linears_in(model)))


def all_linear(model: "PreTrainedModel") -> list[str]:
    """The shortest ends of paths that reach every linear layer but the head, and no other module, without those that
    PEFT has no LoRA for. PEFT's own `all-linear` does not know frozen layers."""
    return [name for name in _ends(model) if has_lora(model, name)]


def has_lora(model: "PreTrainedModel", name: str) -> bool:
    """Whether PEFT has a LoRA for the linear layers of this name in this model."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    last = name.rpartition(".")[2]
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, last)
    except ValueError:
        return False
    return not means_experts(model, last)


def means_experts(model: "PreTrainedModel", name: str) -> bool:
    """Whether PEFT takes a name for weights of experts in this model."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # it is a part of a weight, and alone here
        return True
    return bool(config.target_parameters)


def with_targets(recipe: LoraRecipe, config: Mapping[str, Any]) -> LoraRecipe:
    """The recipe with target modules that the model has: where it leaves the default and the model has no such layers,
    PEFT's default for its type, or all linear layers.

    config: the content of config.json.
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    model, default = seen_in(config).model, LoraRecipe().target_modules
    if recipe.target_modules != default or set(linear_names(model)).issuperset(default):
        return recipe
    of_peft = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(config["model_type"])
    fits = isinstance(of_peft, list) and set(all_linear(model)).issuperset(of_peft)
    return recipe.model_copy(update={"target_modules": of_peft if fits else ALL})


def left_out(recipe: LoraRecipe, config: Mapping[str, Any]) -> str:
    """What `all-linear` leaves out of a model, in words; "" if that is the head alone, or if the recipe names layers.

    config: the content of config.json.
    """
    if recipe.target_modules != ALL:
        return ""
    model, structure, _ = seen_in(config)
    layers = model.get_submodule(structure.layers)
    experts = ["the experts"] if any(weight.dim() == 3 for weight in layers.parameters()) else []
    return ", ".join([*(name for name in _ends(model) if not has_lora(model, name)), *experts])


def _ends(model: "PreTrainedModel") -> list[str]:
    head = structure_of(model).head
    linears = [path for path in linears_in(model) if path != head]
    others = {end for path in dict(model.named_modules()).keys() - set(linears) for end in _ends_of(path)}
    return list(dict.fromkeys(next((end for end in _ends_of(path) if end not in others), path) for path in linears))


def _ends_of(path: str) -> list[str]:
    """a.b.c -> c, b.c, a.b.c."""
    parts = path.split(".")
    return [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
