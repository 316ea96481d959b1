"""LoRA on a frozen base, with PEFT: W x + (alpha / r) B A x, with A [r, in] and B [out, r] in fp32 (arXiv 2106.09685).

The adapter is an ordinary PEFT adapter: stock `peft` loads it on the stock model.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers.pytorch_utils import Conv1D

from huarizo.errors import RecipeError
from huarizo.model.adapter import CHECKS
from huarizo.model.added_tokens import SETTING, lengthen
from huarizo.model.architectures.structure import LINEAR, linears_in, structure_of
from huarizo.model.float_lora import register
from huarizo.model.frozen.linear import FrozenLinear
from huarizo.model.frozen.storages import STORAGES
from huarizo.model.skeleton import skeleton
from huarizo.model.targets import ALL, all_linear, linear_names, means_experts
from huarizo.recipe import LoraRecipe
from huarizo.wording import did_you_mean, first_line, listed

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

BY_HUARIZO = ("peft_type", "task_type", "inference_mode", "base_model_name_or_path", "revision", "peft_version")
NO_BIAS = "chat, merge and export load changes of weights only, and most models have no biases"
WITH_ROWS = "it is initialised from gradients or activations of rows; pissa and olora need only the weights"
REASONS = {
    **dict.fromkeys(BY_HUARIZO, "Huarizo sets it"),
    "bias": NO_BIAS,
    "lora_bias": NO_BIAS,
    "fan_in_fan_out": "Huarizo sets it where a model's linear layers are stored as [in, out]",
    "exclude_modules": "give a list of plain names, not a pattern",
    "rank_pattern": "give plain names (q_proj, or layers.0.self_attn.q_proj) and ranks, not patterns",
    "alpha_pattern": "give plain names (q_proj, or layers.0.self_attn.q_proj) and numbers, not patterns",
    "modules_to_save": "give a list of names, such as [embed_tokens, lm_head]",
    "init_lora_weights": "give true, false, gaussian, orthogonal, pissa or olora. eva, corda and lora_ga are "
    "initialised from gradients or activations of rows; loftq and pissa_niter_N change the base differently at each "
    "loading",
    **dict.fromkeys(("eva_config", "corda_config", "lora_ga_config"), WITH_ROWS),
    "layer_replication": "the result has other layers than the base, so no GGUF or merged base would fit it",
    "target_parameters": "it is for mixtures of experts, and this model has none",
    "trainable_token_indices": "name the tokens: data.special_tokens trains their rows",
    "ensure_weight_tying": "train the embedding or the head, not both, or neither",
    "use_qalora": "it is for GPTQ bases, and Huarizo adds LoRA to float bases",
}
"""Why an option of PEFT is refused, and what to write instead."""
ALSO_REFUSED: dict[str, Callable[[object], bool]] = {
    "lora_bias": lambda value: value is True,
    "fan_in_fan_out": lambda value: value is True,
    "init_lora_weights": lambda value: isinstance(value, str) and value.startswith("pissa_"),
    "exclude_modules": lambda value: isinstance(value, str),
    "modules_to_save": lambda value: isinstance(value, str),
    "trainable_token_indices": lambda value: value is not None,
}
"""Values that an existing adapter may have, but that are refused for training."""


def check_lora(folder: Path, recipe: LoraRecipe, precision: str, tokens: Sequence[int] = ()) -> int:
    """Check that a recipe's LoRA fits a model and that chat, merge, export and stock PEFT can load it.

    No weights are loaded.

    folder: the model's. precision: of the frozen base. tokens: ids of the tokens whose rows are trained.

    Returns:
        The number of trained weights.

    Raises:
        RecipeError: the LoRA doesn't fit; the message names the setting.
    """
    model = skeleton(folder)
    lengthen(model, max(tokens, default=-1) + 1)
    _check_options(recipe.options)
    stored = precision in STORAGES
    if tokens and stored:
        raise RecipeError(
            f"{SETTING}: their rows are trained in float, and with precision {precision} the head is frozen in "
            f"{precision}. Set precision=bf16 or fp32"
        )
    if stored and recipe.options.get("use_dora"):
        raise RecipeError(
            f"lora.options.use_dora: not supported with precision {precision}. Set precision=bf16 or fp32"
        )
    plain = {name: value for name, value in recipe.options.items() if name != "init_lora_weights"}
    with warnings.catch_warnings(record=True) as warned, torch.random.fork_rng(devices=[]):
        warnings.simplefilter("always")
        peft_model = add_lora(model, recipe.model_copy(update={"options": plain}), 0, tokens)
    for warning in warned:
        if "did not match any" in str(warning.message):
            raise RecipeError(f"lora.options: {warning.message}")
    modules = dict(model.named_modules())
    for name in recipe.options.get("modules_to_save") or []:
        found = [module for path, module in modules.items() if path == name or path.endswith(f".{name}")]
        if not found:
            raise RecipeError(f"lora.options.modules_to_save: the model has no {name!r}")
        wrapped = any(isinstance(part, LINEAR) for module in found for part in module.modules())
        if stored and wrapped:
            raise RecipeError(
                f"lora.options.modules_to_save: with precision {precision} {name} is frozen in {precision}. Set "
                "precision=bf16 or fp32"
            )
    return peft_model.num_parameters(only_trainable=True)


def _check_options(options: Mapping[str, object]) -> None:
    from peft import LoraConfig

    defaults, problems = dataclasses.asdict(LoraConfig()), []
    for name, value in options.items():
        fits = name not in BY_HUARIZO and (value == defaults.get(name) or (name in CHECKS and CHECKS[name](value)))
        if not fits or (name in ALSO_REFUSED and ALSO_REFUSED[name](value)):
            reason = REASONS.get(name, "the result is not a plain LoRA, and chat, merge and export load no other")
            problems.append(f"lora.options.{name}={value!r}"[:100] + f": {reason}")
    if problems:
        raise RecipeError(f"lora.options: not every setting of PEFT is supported\n{listed(problems)}")


def add_lora(model: "PreTrainedModel", recipe: LoraRecipe, seed: int, tokens: Sequence[int] = ()) -> "PeftModel":
    """Wrap `model` in a PeftModel with a new fp32 adapter, initialised from `seed` alone.

    tokens: ids of the tokens whose rows of embedding and head are trained as well.

    Raises:
        RecipeError: target_modules names no linear layer of this model, or PEFT refuses the options.
    """
    from peft import LoraConfig, get_peft_model

    known = linear_names(model)
    targets = recipe.target_modules
    if targets == ALL:
        targets = all_linear(model)
    for name in targets:
        last = name.rpartition(".")[2]
        if last not in known:
            near = did_you_mean(name, known) or "."
            raise RecipeError(
                f"lora.target_modules: the model has no linear layer {name!r}{near} It has {', '.join(known)}"
            )
        if means_experts(model, last):
            raise RecipeError(
                f"lora.target_modules: PEFT takes {name!r} for the weights of this model's experts, and a LoRA on them "
                f"can't be merged. Name others: {', '.join(all_linear(model))}"
            )
    _check_options(recipe.options)
    rows = _rows_config(model, recipe, targets, tokens)
    torch.manual_seed(seed)
    try:
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=recipe.r,
            lora_alpha=int(recipe.alpha) if recipe.alpha == int(recipe.alpha) else recipe.alpha,  # pyright: ignore
            lora_dropout=recipe.dropout,
            target_modules=targets,
            **{"bias": "none", "fan_in_fan_out": _are_transposed(model, targets), **recipe.options, **rows},
        )
        return get_peft_model(model, register(config))
    except (ValueError, TypeError, ImportError, AttributeError, LookupError) as error:
        raise RecipeError(f"lora: peft refuses these settings: {first_line(error)}") from None


def _are_transposed(model: "PreTrainedModel", targets: Sequence[str]) -> bool:
    """Whether the weights of one of the targets are [in, out]."""
    transposed = {path.rpartition(".")[2] for path, linear in linears_in(model).items() if isinstance(linear, Conv1D)}
    return not transposed.isdisjoint(name.rpartition(".")[2] for name in targets)


def _rows_config(
    model: "PreTrainedModel", recipe: LoraRecipe, targets: Sequence[str], tokens: Sequence[int]
) -> dict[str, list[int] | dict[str, list[int]]]:
    """PEFT's settings to train the rows of these tokens; {} if embedding and head are trained as a whole.

    Raises:
        RecipeError: another part of the adapter changes embedding or head.
    """
    if not tokens:
        return {}
    embedding, head = structure_of(model).vocabulary_layers
    whole = [name for name in recipe.options.get("modules_to_save") or [] if name in (embedding, head)]
    if set(whole) == {embedding, head}:
        return {}
    if whole:
        raise RecipeError(
            f"lora.options.modules_to_save: with {SETTING} name embedding and head, [{embedding}, {head}], or "
            f"neither, not {whole[0]} alone"
        )
    if any(name.rpartition(".")[2] == head for name in targets):
        raise RecipeError(f"lora.target_modules: with {SETTING} the head's rows are trained, so {head} can't be here")
    ids = list(tokens)
    return {"trainable_token_indices": ids if model.config.tie_word_embeddings else {embedding: ids, head: ids}}


def count_weights(model: "PreTrainedModel | PeftModel") -> int:
    """The number of weights of a model: its parameters and those of its FrozenLinear layers.

    A quantised head that is tied to the embedding is a copy of it, and isn't counted.
    """
    copy = model.get_output_embeddings() if model.config.tie_word_embeddings else None
    stored = _stored(model) - (0 if copy is None else _stored(copy))
    return stored + sum(parameter.numel() for parameter in model.parameters())


def _stored(module: torch.nn.Module) -> int:
    """The number of weights in the FrozenLinear layers of a module, itself included."""
    return sum(layer.count_weights() for layer in module.modules() if isinstance(layer, FrozenLinear))
