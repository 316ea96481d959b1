"""Prepares a recipe: finds every name, checks and tokenises every row, plans precision and memory.

The user's mistakes are reported here, before a model loads and before anything is written to a run folder.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from huarizo.data.dataset import Data, prepare_data
from huarizo.errors import DataError, RecipeError
from huarizo.files import sha256_of
from huarizo.host import cache_folder, world_size
from huarizo.hub.names import check_pinned, files_of, pins, resolve_data, resolve_model
from huarizo.hub.sources import Source
from huarizo.machine import device, float_precision, from_first, name_of
from huarizo.model.added_tokens import SETTING, add_tokens, rows_to_train, size_of
from huarizo.model.batching import planned_batching
from huarizo.model.compile import why_not
from huarizo.model.frozen.measure import int8_gain
from huarizo.model.frozen.storages import STORAGES
from huarizo.model.load import (
    activation_bytes_per_token,
    checkpoint_bytes_per_token,
    load_tokenizer,
    positions,
    read_config,
    weight_bytes,
)
from huarizo.model.lora import check_lora
from huarizo.model.padded_loss import logits_bytes_per_token
from huarizo.model.skeleton import reason_for_floats, seen_in
from huarizo.model.targets import with_targets
from huarizo.model.weights import check_weights
from huarizo.plan import PADDED, Choice, ModelSize, Plan, choose_precision, make_plan, nearest_precision, read_plan
from huarizo.recipe import Recipe, names_of
from huarizo.runs import Run
from huarizo.training.settings import check_trainer_settings


@dataclass(frozen=True)
class Prepared:
    """A resolved recipe with its model and data found, its rows tokenised, and its plan."""

    recipe: Recipe
    model_source: Source
    data_sources: list[Source]
    data: Data
    plan: Plan


def prepare(recipe: Recipe, resumed: Run | None = None) -> Prepared:
    """Find model and data, read and tokenise the rows, and plan the computation. No weights are loaded.

    resumed: the run that is being resumed. It may come from another machine, in a precision that this one lacks.

    Raises:
        UserError: a mistake in the recipe or its data; the message names the remedy.
    """
    on, before = device(), _earlier_plan(resumed)
    choice = _first_choice(recipe, on, resumed is not None, before)
    check_trainer_settings(recipe, choice, on)
    model = resolve_model(recipe.model)
    train = [resolve_data(name) for name in names_of(recipe.data.train)]
    heldout = [resolve_data(name, heldout=True) for name in names_of(recipe.data.eval)]
    used = {"model": [model], "train": train} | ({"eval": heldout} if heldout else {})
    for role, sources in used.items():
        check_pinned(role, sources, recipe.pinned.get(role, {}))
    config = read_config(model.path)
    choice = _possible(choice, recipe, config, on)
    recipe, cut = _within_positions(recipe, config)
    recipe = recipe.model_copy(update={"lora": with_targets(recipe.lora, config)})
    check_weights(model.path)
    tokenizer, added = load_tokenizer(model.path), recipe.data.special_tokens or []
    add_tokens(tokenizer, added)
    tokens = rows_to_train(tokenizer, added, config["vocab_size"])
    trained = check_lora(model.path, recipe.lora, choice.precision, tokens)
    data = prepare_data(
        recipe.data, recipe.training.seed, files_of(train), files_of(heldout), tokenizer, cache_folder() / "tokens"
    )
    rows = max(config["vocab_size"], size_of(tokenizer) if added else 0)
    chosen = [source.note for source in (*train, *heldout) if source.note]
    data = replace(data, notes=[*chosen, *cut, *_unused_tokens(data, rows), *data.notes])
    for file in changed_files([*train, *heldout]):
        raise DataError(f"{file} changed while it was being read. Run again when nothing writes to it")
    resolved = recipe.model_copy(deep=True)
    resolved.model = model.pinned
    resolved.data.train = _pinned(train)
    if heldout:
        resolved.data.eval = _pinned(heldout)
    resolved.data.prompt, resolved.data.date = data.encoder.prompt.name, data.encoder.prompt.date
    resolved.pinned = {role: pins(sources) for role, sources in used.items()}
    plan = _first_plan(recipe, choice, config, trained, on, before)
    return Prepared(resolved, model, [*train, *heldout], data, plan)


def _pinned(sources: list[Source]) -> str | list[str]:
    return sources[0].pinned if len(sources) == 1 else [source.pinned for source in sources]


def _unused_tokens(data: Data, size: int) -> list[str]:
    """A note if the tokenizer has tokens beyond an embedding of `size` rows, and the data uses none of them.

    Raises:
        ModelError: the data uses one.
    """
    encoder = data.encoder
    encoder.check_embedding(max(part.largest for part in (data.train, data.heldout) if part is not None), size)
    if encoder.vocabulary <= size:
        return []
    return [
        f"the tokenizer has {encoder.vocabulary:,} tokens, and the model's embedding {size:,}. No row uses the "
        "others; a prompt that does is refused"
    ]


def _within_positions(recipe: Recipe, config: dict[str, Any]) -> tuple[Recipe, list[str]]:
    """The recipe with `data.max_length` within the model's positions, and a note if it had to be lowered."""
    most, asked = positions(config), recipe.data.max_length
    if asked <= most:
        return recipe, []
    recipe = recipe.model_copy(deep=True)
    recipe.data.max_length = most
    return recipe, [f"rows are cut at the {most:,} tokens that the model supports, not at data.max_length={asked}"]


def _earlier_plan(resumed: Run | None) -> Plan | None:
    """The plan of the run to be resumed, if it was made for this machine."""
    plan = read_plan(resumed.plan_file) if resumed else None
    return plan if plan is not None and plan.is_for(name_of(device()), world_size()) else None


def _first_choice(recipe: Recipe, on: torch.device, resumed: bool, before: Plan | None) -> Choice:
    """The precision, chosen by the first process for all."""
    text = from_first(lambda: json.dumps(_choose(recipe, on, resumed, before).to_values()), on)
    return Choice.from_values(json.loads(text))


def _first_plan(
    recipe: Recipe, choice: Choice, config: dict[str, Any], trained: int, on: torch.device, before: Plan | None
) -> Plan:
    """The plan, made by the first process for all."""
    batching = planned_batching(config)
    packed = batching[0] == "packed"
    size = ModelSize(
        weights=weight_bytes(config, choice.precision, choice.dtype),
        trained=trained,
        activations=activation_bytes_per_token(config, choice.dtype),
        checkpoints=checkpoint_bytes_per_token(config, choice.dtype),
    )
    if not packed:
        logits = logits_bytes_per_token(config, choice.dtype)
        size = replace(size, activations=size.activations + logits, checkpoints=size.checkpoints + logits)

    def make() -> str:
        compilation = "as the recipe asks"
        if recipe.training.compile:
            compilation = why_not(on) or "" if packed else PADDED
        return make_plan(recipe, choice, size, on, compilation, before, batching).to_json()

    return Plan.from_json(from_first(make, on))


def _choose(recipe: Recipe, on: torch.device, resumed: bool, before: Plan | None) -> Choice:
    """The precision. A resumed run keeps its own on the same machine, because a new measurement might differ."""
    if recipe.precision != "auto":
        return nearest_precision(recipe.precision, on) if resumed else choose_precision(recipe.precision, on)
    if before is not None:
        return before.choice
    if recipe.data.special_tokens:
        reason = f"the rows of {SETTING} are trained in float"
        return replace(choose_precision(float_precision(on), on), reason=reason)
    return choose_precision("auto", on, int8_gain)


def _possible(choice: Choice, recipe: Recipe, config: dict[str, Any], on: torch.device) -> Choice:
    """The choice; but in float for a model whose weights can't be stored otherwise, if int8 was chosen by `auto`.

    Raises:
        RecipeError: the recipe asks for int8 for such a model.
    """
    if choice.precision not in STORAGES or not (reason := reason_for_floats(seen_in(config))):
        return choice
    if recipe.precision != "auto":
        raise RecipeError(f"precision: {reason}. Set precision=auto, bf16 or fp32, not {choice.precision}")
    return replace(choose_precision(float_precision(on), on), reason=reason)


def changed_files(sources: Iterable[Source]) -> list[Path]:
    """The data files that have changed or vanished since they were found."""
    changed = []
    for source in sources:
        for name, digest in source.sha256.items():
            path = source.path / name if source.path.is_dir() else source.path
            if not path.is_file() or sha256_of(path) != digest:
                changed.append(path)
    return changed
