"""A recipe is made ready: every name found, every row checked and tokenised, precision and memory planned.

What the user may have got wrong is told here, before a model loads and before anything is written into a run folder.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from huarizo.data.prepare import Data, prepare_data
from huarizo.errors import DataError, ModelError
from huarizo.files import sha256_of
from huarizo.host import cache_folder
from huarizo.hub.names import Source, check_pinned, files_of, pins, resolve_data, resolve_model
from huarizo.machine import (
    Choice,
    available_memory,
    choose_precision,
    device,
    float_precision,
    micro_batch_tokens,
)
from huarizo.model.added_tokens import SETTING, add_tokens, rows_to_train, size_of
from huarizo.model.load import activation_bytes_per_token, load_tokenizer, read_config, weight_bytes
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


def prepare(recipe: Recipe) -> Prepared:
    """Find model and data, read and tokenise the rows, choose the precision; nothing heavy is loaded.

    Raises:
        UserError: whatever the user can mend, with the remedy.
    """
    on = device()
    choice = _choose_precision(recipe, on)
    check_trainer_settings(recipe, choice, on)
    model = resolve_model(recipe.model)
    train = [resolve_data(name) for name in names_of(recipe.data.train)]
    heldout = [resolve_data(name, heldout=True) for name in names_of(recipe.data.eval)]
    used = {"model": [model], "train": train} | ({"eval": heldout} if heldout else {})
    for role, sources in used.items():
        check_pinned(role, sources, recipe.pinned.get(role, {}))
    config = read_config(model.path)
    check_weights(model.path)
    tokenizer, added = load_tokenizer(model.path), recipe.data.special_tokens or []
    add_tokens(tokenizer, added)
    check_lora(model.path, recipe.lora, choice.precision, rows_to_train(tokenizer, added, config["vocab_size"]))
    data = prepare_data(
        recipe.data, recipe.training.seed, files_of(train), files_of(heldout), tokenizer, cache_folder() / "tokens"
    )
    _check_vocabulary(data, max(config["vocab_size"], size_of(tokenizer) if added else 0))
    data = replace(data, notes=[*(source.note for source in (*train, *heldout) if source.note), *data.notes])
    for file in changed_files([*train, *heldout]):
        raise DataError(f"{file} changed while it was read. Run again when it is written to no more")
    resolved = recipe.model_copy(deep=True)
    _fit_memory(resolved, config, choice, available_memory(on))
    resolved.model = model.pinned
    resolved.data.train = _pinned(train)
    if heldout:
        resolved.data.eval = _pinned(heldout)
    resolved.data.prompt, resolved.data.date = data.encoder.prompt.name, data.encoder.prompt.date
    resolved.precision = choice.precision
    resolved.pinned = {role: pins(sources) for role, sources in used.items()}
    return Prepared(resolved, model, [*train, *heldout], data, choice)


def _choose_precision(recipe: Recipe, on: torch.device) -> Choice:
    """The recipe's precision; left to the machine, a float one where rows of the head are trained."""
    if recipe.precision == "auto" and recipe.data.special_tokens:
        reason = f"the rows of {SETTING} are trained in float"
        return replace(choose_precision(float_precision(on), on), reason=reason)
    return choose_precision(recipe.precision, on)


def _pinned(sources: list[Source]) -> str | list[str]:
    return sources[0].pinned if len(sources) == 1 else [source.pinned for source in sources]


def _check_vocabulary(data: Data, rows: int) -> None:
    """Whether an embedding of so many rows has one for every token of the data. A tokenizer may have more that are
    never used."""
    largest = max(part.largest for part in (data.train, data.heldout) if part is not None)
    if largest >= rows:
        token = data.encoder.tokenizer.convert_ids_to_tokens(largest)
        raise ModelError(
            f"the tokenizer has {len(data.encoder.tokenizer):,} tokens, but the model's embedding has only "
            f"{rows:,}, and the data uses one beyond it ({token!r}). Use the tokenizer that belongs to "
            "this model, or a model whose embedding was made larger with it"
        )


def _fit_memory(recipe: Recipe, config: dict[str, Any], choice: Choice, available: int) -> None:
    """Choose the micro-batches, and activation checkpointing where not even the longest row fits without."""
    if recipe.training.micro_batch_tokens is not None:
        return
    free = available - weight_bytes(config, choice.precision, choice.dtype)
    tokens = micro_batch_tokens(activation_bytes_per_token(config, choice.dtype), free, device())
    if tokens < recipe.data.max_length and "gradient_checkpointing" not in recipe.trainer:
        recipe.trainer["gradient_checkpointing"] = True
        tokens = recipe.data.max_length
    recipe.training.micro_batch_tokens = max(tokens, 64)


def changed_files(sources: Iterable[Source]) -> list[Path]:
    """The files of data sets that are no longer what was found at first, or no longer there."""
    changed = []
    for source in sources:
        for name, digest in source.sha256.items():
            path = source.path / name if source.path.is_dir() else source.path
            if not path.is_file() or sha256_of(path) != digest:
                changed.append(path)
    return changed
