"""Decides whether a run can be resumed from a checkpoint, given its recipe and this machine.

A different base model, data set, LoRA, optimizer or row order would make it a different run, so these are refused.
Versions, machines and some settings may differ. Those differences are reported, because the result will not be
bit-identical to that of an uninterrupted run.
"""

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from enum import Enum
from importlib.metadata import version
from typing import TypedDict

import torch

from huarizo.errors import UserError
from huarizo.host import cpu_flags, world_size
from huarizo.kernels.libraries import libraries
from huarizo.plan import Plan
from huarizo.recipe import Recipe, to_yaml
from huarizo.recipe_file import parse_yaml
from huarizo.training.checkpoint import Checkpoint

LIBRARIES = ("huarizo", "torch", "transformers", "peft", "accelerate")
INSTRUCTIONS = {"avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"} | {
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
}
"""CPU flags that select the code paths of torch and the C kernels, and so affect rounding."""


class Effect(Enum):
    """What happens to a resumed run when a setting has changed since the checkpoint."""

    NONE = "it does not affect training"
    ROUNDING = "it affects rounding only"
    FROM_HERE = "the new value is used from the checkpoint's step on"
    OTHER_RUN = "it would be a different run"


EFFECTS = {
    "model": Effect.NONE,  # the pinned digests of model and data decide, not where they are
    "pinned": Effect.OTHER_RUN,
    "data": Effect.OTHER_RUN,
    "data.train": Effect.NONE,
    "data.eval": Effect.FROM_HERE,
    "data.on_bad_row": Effect.FROM_HERE,
    "lora": Effect.OTHER_RUN,
    "lora.dropout": Effect.FROM_HERE,
    "training": Effect.OTHER_RUN,  # the checkpoint restores the settings of optimizer and schedule
    "training.epochs": Effect.FROM_HERE,
    "training.max_steps": Effect.FROM_HERE,
    "training.micro_batch_tokens": Effect.ROUNDING,
    "training.compile": Effect.ROUNDING,
    **dict.fromkeys(("training.eval_every", "training.save_every", "training.save_minutes"), Effect.NONE),
    **dict.fromkeys(("training.keep", "training.max_minutes"), Effect.NONE),
    "trainer": Effect.OTHER_RUN,
    "trainer.gradient_checkpointing": Effect.ROUNDING,
    **dict.fromkeys(("trainer.max_grad_norm", "trainer.report_to", "trainer.run_name"), Effect.FROM_HERE),
    **dict.fromkeys(("trainer.logging_steps", "trainer.logging_strategy"), Effect.FROM_HERE),
    "trainer.logging_first_step": Effect.FROM_HERE,
    "precision": Effect.ROUNDING,
    "samples": Effect.NONE,
    "output": Effect.NONE,
}
"""By dotted key. A key that is not listed has the effect of its section."""


REPORTED = {
    **{key: key for key in ("precision", "device", "instructions", "kernels", "tier", "threads", "processes")},
    "compiled": "layers compiled",
    "micro_batch_tokens": "tokens computed at once",
    "activation_checkpointing": "activation checkpointing",
}
"""Facts that affect rounding, each with its name in messages."""
OF_ANOTHER = {"tier": " (products of int8 are the same; others may be rounded differently)"}
"""What differs where a fact does, if that can be said."""


class Facts(TypedDict):
    """What a checkpoint's manifest records to identify recipe, data, base model and machine."""

    recipe: str
    """A digest of the settings that affect training."""
    base: str
    """A digest of the pinned model."""
    data: str
    """The fingerprint of the tokenised training rows."""
    precision: str
    device: str
    instructions: list[str]
    kernels: list[str]
    tier: list[str]
    """The instruction sets that the kernels were compiled for; of one compiler it is one."""
    threads: int
    processes: int
    compiled: bool
    batching: str
    """How examples go through the model; a resumed run keeps it."""
    micro_batch_tokens: int
    activation_checkpointing: bool
    versions: dict[str, str]


SHOWN_BY = {
    "precision": "precision",
    "training.micro_batch_tokens": "micro_batch_tokens",
    "training.compile": "compiled",
    "trainer.gradient_checkpointing": "activation_checkpointing",
}
"""Settings that a plan is made from, each with the fact that shows the outcome. Older checkpoints lack some facts."""


def effect_of(key: str) -> Effect:
    """The effect of a setting, by its dotted key."""
    while key and key not in EFFECTS:
        key = key.rpartition(".")[0]
    return EFFECTS[key]


def facts_of(recipe: Recipe, data_fingerprint: str, plan: Plan, device: torch.device) -> Facts:
    """The facts of a run with this plan on this device."""
    precision = plan.choice.precision
    found = libraries(precision) if device.type == "cpu" else {}
    kernels = {name: library for name, library in found.items() if not isinstance(library, str)}
    return {
        "recipe": _digest(_settings(to_yaml(recipe))),
        "base": _digest(recipe.pinned.get("model", {})),
        "data": data_fingerprint,
        "precision": precision,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "instructions": sorted(cpu_flags() & INSTRUCTIONS) if device.type == "cpu" else [],
        "kernels": list(kernels),
        "tier": sorted({library.tier.name for library in kernels.values()}),
        "threads": torch.get_num_threads(),
        "processes": world_size(),
        "compiled": plan.compiled,
        "batching": plan.batching,
        "micro_batch_tokens": plan.micro_batch_tokens,
        "activation_checkpointing": plan.activation_checkpointing,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
    }


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _settings(yaml: str) -> dict[str, object]:
    """A resolved recipe's settings by dotted key, without those that do not affect training."""

    def walk(values: Mapping[str, object], prefix: str) -> Iterator[tuple[str, object]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            elif effect_of(prefix + key) is not Effect.NONE:
                yield prefix + key, value

    return dict(walk(parse_yaml(yaml), ""))


def same_training(one: Recipe, other: Recipe) -> bool:
    """Whether two resolved recipes train the same thing. Their dates may differ: a resumed run keeps its own."""
    before, after = (_settings(to_yaml(recipe)) for recipe in (one, other))
    keys = {key for key in before.keys() | after.keys() if effect_of(key) is not Effect.ROUNDING} - {"data.date"}
    return all(before.get(key) == after.get(key) for key in keys)


def changes_since(checkpoint: Checkpoint, recipe: Recipe, now: Facts) -> list[str]:
    """Describe the differences between then and now that affect the result.

    now: `facts_of` the run as it would be resumed.

    Raises:
        UserError: the differences would make it a different run.
    """
    then, facts = checkpoint.manifest, dict[str, object](now)
    before, after = _settings(checkpoint.files["recipe.yaml"].decode()), _settings(to_yaml(recipe))
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    harmful = [key for key in changed if effect_of(key) is Effect.OTHER_RUN]
    reasons = [f"{key} was {before.get(key)!r} and is {after.get(key)!r}" for key in harmful]
    if not harmful:
        reasons += ["the base model has changed"] if then["base"] != now["base"] else []
        reasons += ["the rows, or how they are tokenised, have changed"] if then["data"] != now["data"] else []
    if reasons:
        raise UserError(
            f"{checkpoint.path}: can't be resumed: {'; '.join(reasons)}. Undo the change, or start a new run "
            "with huarizo train"
        )
    unseen = {key for key, fact in SHOWN_BY.items() if fact not in then}
    used = [key for key in changed if effect_of(key) is Effect.FROM_HERE or key in unseen]
    found = [f"{key} was {before.get(key)!r} and is {after.get(key)!r}" for key in used]
    for key, name in REPORTED.items():
        if key in then and then[key] != facts[key]:
            found.append(f"{name}: {_in_words(then[key])} then, {_in_words(facts[key])} now{OF_ANOTHER.get(key, '')}")
    for name, number in now["versions"].items():
        if then["versions"].get(name) != number:
            found.append(f"{name} {then['versions'].get(name)} then, {number} now")
    return list(dict.fromkeys(found))


def _in_words(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (" ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)
