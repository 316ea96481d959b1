"""A recipe is made ready: every name found, every row checked and tokenised, precision and memory planned.

What the user may have got wrong is told here, before a model loads and before anything is written into a run folder.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from huarizo.data.dataset import Data, prepare_data
from huarizo.errors import DataError
from huarizo.files import sha256_of
from huarizo.host import cache_folder, rank
from huarizo.hub.names import check_pinned, files_of, pins, resolve_data, resolve_model
from huarizo.hub.sources import Source
from huarizo.machine import (
    DTYPES,
    Choice,
    FixedPrecision,
    as_first,
    available_memory,
    choose_precision,
    device,
    float_precision,
    micro_batch_tokens,
    nearest_precision,
    spread,
)
from huarizo.model.added_tokens import SETTING, add_tokens, rows_to_train, size_of
from huarizo.model.frozen.measure import int8_gain
from huarizo.model.load import activation_bytes_per_token, load_tokenizer, positions, read_config, weight_bytes
from huarizo.model.lora import check_lora
from huarizo.model.weights import check_weights
from huarizo.recipe import Recipe, names_of
from huarizo.training.settings import check_trainer_settings


@dataclass(frozen=True)
class Prepared:
    """A recipe whose every name has been found and checked, with its data tokenised. `recipe` is resolved."""

    recipe: Recipe
    model_source: Source
    data_sources: list[Source]
    data: Data
    choice: Choice


def prepare(recipe: Recipe, resumed: bool = False) -> Prepared:
    """Find model and data, read and tokenise the rows, choose the precision; nothing heavy is loaded.

    resumed: the recipe is that of a run, which may have been made on another machine, in a format that is not here.

    Raises:
        UserError: whatever the user can mend, with the remedy.
    """
    on = device()
    choice = _choose(recipe, on, resumed)
    check_trainer_settings(recipe, choice, on)
    model = resolve_model(recipe.model)
    train = [resolve_data(name) for name in names_of(recipe.data.train)]
    heldout = [resolve_data(name, heldout=True) for name in names_of(recipe.data.eval)]
    used = {"model": [model], "train": train} | ({"eval": heldout} if heldout else {})
    for role, sources in used.items():
        check_pinned(role, sources, recipe.pinned.get(role, {}))
    config = read_config(model.path)
    recipe, cut = _within_positions(recipe, config)
    check_weights(model.path)
    tokenizer, added = load_tokenizer(model.path), recipe.data.special_tokens or []
    add_tokens(tokenizer, added)
    check_lora(model.path, recipe.lora, choice.precision, rows_to_train(tokenizer, added, config["vocab_size"]))
    data = prepare_data(
        recipe.data, recipe.training.seed, files_of(train), files_of(heldout), tokenizer, cache_folder() / "tokens"
    )
    rows = max(config["vocab_size"], size_of(tokenizer) if added else 0)
    chosen = [source.note for source in (*train, *heldout) if source.note]
    data = replace(data, notes=[*chosen, *cut, *_unused_tokens(data, rows), *data.notes])
    for file in changed_files([*train, *heldout]):
        raise DataError(f"{file} changed while it was read. Run again when it is written to no more")
    resolved = recipe.model_copy(deep=True)
    needed = weight_bytes(config, choice.precision, choice.dtype)
    everywhere = choice.precision != "int8" and spread(needed, on)
    _fit_memory(resolved, config, choice, available_memory(on, everywhere))
    resolved.model = model.pinned
    resolved.data.train = _pinned(train)
    if heldout:
        resolved.data.eval = _pinned(heldout)
    resolved.data.prompt, resolved.data.date = data.encoder.prompt.name, data.encoder.prompt.date
    resolved.precision = choice.precision
    resolved.pinned = {role: pins(sources) for role, sources in used.items()}
    return Prepared(resolved, model, [*train, *heldout], data, choice)


def _pinned(sources: list[Source]) -> str | list[str]:
    return sources[0].pinned if len(sources) == 1 else [source.pinned for source in sources]


def _unused_tokens(data: Data, size: int) -> list[str]:
    """A note of tokens beyond an embedding of `size` rows, where there are such and the data uses none.

    Raises:
        ModelError: the data uses one.
    """
    encoder = data.encoder
    encoder.check_embedding(max(part.largest for part in (data.train, data.heldout) if part is not None), size)
    if encoder.vocabulary <= size:
        return []
    return [
        f"the tokenizer has {encoder.vocabulary:,} tokens, and the model's embedding {size:,}. The rows use none "
        "beyond it; a prompt that does is refused"
    ]


def _within_positions(recipe: Recipe, config: dict[str, Any]) -> tuple[Recipe, list[str]]:
    """The recipe with rows no longer than what the model was made for, and a note where that is less than it says."""
    most, asked = positions(config), recipe.data.max_length
    if asked <= most:
        return recipe, []
    recipe = recipe.model_copy(deep=True)
    recipe.data.max_length = most
    return recipe, [f"rows are cut at the {most:,} tokens that the model was made for, not at data.max_length={asked}"]


def _choose(recipe: Recipe, on: torch.device, resumed: bool) -> Choice:
    """The precision, which the first process chooses for all."""
    names: list[FixedPrecision] = ["int8", "bf16", "fp16", "fp32"]
    if rank():
        precision, dtype = as_first([0, 0], on)
        return Choice(names[precision], "as the first process chose", DTYPES[names[dtype]])
    if recipe.precision == "auto" and recipe.data.special_tokens:
        reason = f"the rows of {SETTING} are trained in float"
        choice = replace(choose_precision(float_precision(on), on), reason=reason)
    elif resumed:
        choice = nearest_precision(recipe.precision, on)
    else:
        choice = choose_precision(recipe.precision, on, int8_gain)
    as_first([names.index(choice.precision), [DTYPES.get(name) for name in names].index(choice.dtype)], on)
    return choice


def _fit_memory(recipe: Recipe, config: dict[str, Any], choice: Choice, available: int) -> None:
    """Choose the micro-batches, and activation checkpointing where not even the longest row fits without.

    The first process chooses for all.
    """
    if recipe.training.micro_batch_tokens is not None:
        return
    on = device()
    free = available - weight_bytes(config, choice.precision, choice.dtype)
    tokens = micro_batch_tokens(activation_bytes_per_token(config, choice.dtype), free, on)
    checkpointing = tokens < recipe.data.max_length and "gradient_checkpointing" not in recipe.trainer
    if checkpointing:
        tokens = recipe.data.max_length
    tokens, checkpointing = as_first([max(tokens, 64), checkpointing], on)
    recipe.training.micro_batch_tokens = tokens
    if checkpointing:
        recipe.trainer["gradient_checkpointing"] = True


def changed_files(sources: Iterable[Source]) -> list[Path]:
    """The files of data sets that are no longer what was found at first, or no longer there."""
    changed = []
    for source in sources:
        for name, digest in source.sha256.items():
            path = source.path / name if source.path.is_dir() else source.path
            if not path.is_file() or sha256_of(path) != digest:
                changed.append(path)
    return changed
