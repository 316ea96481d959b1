"""LoRA on a frozen base, by PEFT: W x + (alpha / r) B A x, with A [r, in] and B [out, r] in fp32 (arXiv 2106.09685).

The adapter is an ordinary PEFT adapter: stock `peft` loads it on the stock model.
"""

import difflib
from typing import Any

import torch

from huarizo.errors import RecipeError
from huarizo.model.int8 import Int8Linear
from huarizo.model.int8_lora import register
from huarizo.recipe import LoraRecipe


def linear_names(model: torch.nn.Module) -> list[str]:
    """Last parts of the names of the model's linear layers, such as q_proj, in order of appearance."""
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Int8Linear)]
    names = [name.rpartition(".")[2] for name in linears]
    return list(dict.fromkeys(names))


def add_lora(model: Any, recipe: LoraRecipe, seed: int) -> Any:
    """A PeftModel around `model`, its adapter in fp32 and drawn from `seed` alone.

    Raises:
        RecipeError: target_modules names no linear layer of this model, or PEFT refuses the options.
    """
    from peft import LoraConfig, get_peft_model

    known = linear_names(model)
    targets = recipe.target_modules
    if targets == "all-linear":  # PEFT's own reading of the word does not know int8 layers
        targets = [name for name in known if name != "lm_head"]
    for name in targets:
        if name.rpartition(".")[2] not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise RecipeError(
                f"lora.target_modules: the model has no linear layer {name!r}{hint} It has {', '.join(known)}"
            )
    torch.manual_seed(seed)
    try:
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=recipe.r,
            lora_alpha=int(recipe.alpha) if recipe.alpha == int(recipe.alpha) else recipe.alpha,  # pyright: ignore
            lora_dropout=recipe.dropout,
            target_modules=targets,
            **{"bias": "none", **recipe.options},
        )
        return get_peft_model(model, register(config))
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"lora: peft refuses these settings: {str(error).strip().splitlines()[0]}") from None


def count_weights(model: Any) -> int:
    """All weights of a model: its parameters, and what is kept in int8."""
    quantised = sum(module.weight.numel() for module in model.modules() if isinstance(module, Int8Linear))
    return quantised + sum(parameter.numel() for parameter in model.parameters())
