"""Whether a run can be resumed from a checkpoint with what is here now, and what that changes.

Another base model, other data, another LoRA, optimizer or order of the rows would make it a different run, so these are
refused. Settings that are used from here on, versions and machines may differ: they are reported, because the result
will not be bit-identical to that of an undisturbed run.
"""

import hashlib
import json
import platform
from collections.abc import Iterator
from enum import Enum
from importlib.metadata import version
from typing import Any

import torch

from huarizo.errors import UserError
from huarizo.host import cpu_flags, world_size
from huarizo.kernels import attention, dropout, int8
from huarizo.plan import Plan
from huarizo.recipe import Recipe, to_yaml
from huarizo.recipe_file import parse_yaml
from huarizo.training.checkpoint import Checkpoint

LIBRARIES = ("huarizo", "torch", "transformers", "peft", "accelerate")
INSTRUCTIONS = {"avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"}
"""Those of the CPU's that decide which products torch and the kernels use, and so how sums are rounded."""


class Effect(Enum):
    """What a setting that has changed since a checkpoint does to a run that is resumed from it."""

    NONE = "no number of the training depends on it"
    ROUNDING = "it is computed in another way"
    FROM_HERE = "it is used from the checkpoint's step on"
    OTHER_RUN = "it would be a different run"


EFFECTS = {
    "model": Effect.NONE,  # of model and data the pinned digests count, not the place
    "pinned": Effect.OTHER_RUN,
    "data": Effect.OTHER_RUN,
    "data.train": Effect.NONE,
    "data.eval": Effect.FROM_HERE,
    "data.on_bad_row": Effect.FROM_HERE,
    "lora": Effect.OTHER_RUN,
    "lora.dropout": Effect.FROM_HERE,
    "training": Effect.OTHER_RUN,  # a checkpoint holds the optimizer's own settings and the schedule's
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
"""By dotted key. A key that is not listed has the effect of the section that it belongs to."""


REPORTED = {
    **{key: key for key in ("precision", "device", "instructions", "kernels", "threads", "processes")},
    "compiled": "layers compiled",
    "micro_batch_tokens": "tokens computed at once",
    "activation_checkpointing": "activation checkpointing",
}
"""Facts that change how a training is computed, and so how it is rounded, each with its name in a report."""


def effect_of(key: str) -> Effect:
    """The effect of a setting, by its dotted key."""
    while key and key not in EFFECTS:
        key = key.rpartition(".")[0]
    return EFFECTS[key]


def facts_of(recipe: Recipe, data_fingerprint: str, plan: Plan, device: torch.device) -> dict[str, Any]:
    """For the manifest: JSON values that tell this recipe, data, base and machine from others."""
    precision = plan.choice.precision
    return {
        "recipe": _digest(_settings(to_yaml(recipe))),
        "base": _digest(recipe.pinned.get("model", {})),
        "data": data_fingerprint,
        "precision": precision,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "instructions": sorted(cpu_flags() & INSTRUCTIONS) if device.type == "cpu" else [],
        "kernels": _kernels(precision) if device.type == "cpu" else [],
        "threads": torch.get_num_threads(),
        "processes": world_size(),
        "compiled": plan.compiled,
        "micro_batch_tokens": plan.micro_batch_tokens,
        "activation_checkpointing": plan.activation_checkpointing,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
    }


def _kernels(precision: str) -> list[str]:
    """The kernels in C that a training on this CPU can use."""
    wanted = {"attention": attention, "dropout": dropout} | ({"int8": int8} if precision == "int8" else {})
    return [name for name, kernel in wanted.items() if not isinstance(kernel.library(), str)]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _settings(yaml: str) -> dict[str, Any]:
    """A resolved recipe's settings by dotted key, without those on which nothing depends."""

    def walk(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            elif effect_of(prefix + key) is not Effect.NONE:
                yield prefix + key, value

    return dict(walk(parse_yaml(yaml), ""))


def same_training(one: Recipe, other: Recipe) -> bool:
    """Whether two resolved recipes train the same thing. The day may differ: a run that is resumed keeps its own."""
    before, after = (_settings(to_yaml(recipe)) for recipe in (one, other))
    keys = {key for key in before.keys() | after.keys() if effect_of(key) is not Effect.ROUNDING} - {"data.date"}
    return all(before.get(key) == after.get(key) for key in keys)


def changes_since(checkpoint: Checkpoint, recipe: Recipe, now: dict[str, Any]) -> list[str]:
    """What has changed since the checkpoint and is worth reporting.

    now: the `facts_of` this moment.

    Raises:
        UserError: with what is here now it would be another run.
    """
    then = checkpoint.manifest
    before, after = _settings(checkpoint.files["recipe.yaml"].decode()), _settings(to_yaml(recipe))
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    harmful = [key for key in changed if effect_of(key) is Effect.OTHER_RUN]
    reasons = [f"{key} was {before.get(key)!r} and is {after.get(key)!r}" for key in harmful]
    if not harmful:
        reasons += ["the base model is another one"] if then["base"] != now["base"] else []
        reasons += ["the rows, or the way they become tokens, are others"] if then["data"] != now["data"] else []
    if reasons:
        raise UserError(
            f"{checkpoint.path}: can't be resumed: {'; '.join(reasons)}. Put it back as it was, or start a new run "
            "with huarizo train"
        )
    used = [key for key in changed if effect_of(key) is Effect.FROM_HERE]
    found = [f"{key} was {before.get(key)!r} and is {after.get(key)!r}" for key in used]
    for key, name in REPORTED.items():
        if key in then and then[key] != now[key]:
            found.append(f"{name}: {_in_words(then[key])} then, {_in_words(now[key])} now")
    for name, number in now["versions"].items():
        if then["versions"].get(name) != number:
            found.append(f"{name} {then['versions'].get(name)} then, {number} now")
    return list(dict.fromkeys(found))


def _in_words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (" ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)
