"""What a checkpoint depends on beside its files, and what it means when that has changed by the time a run goes on.

Another base model, other data, another LoRA, optimizer or order of the rows would make a different run of it: refused.
Settings that are used from here on, versions and machines are told, because the result will not be bit-identical to the
undisturbed run's.
"""

import hashlib
import json
import platform
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch

from huarizo.errors import UserError
from huarizo.host import cpu_flags, world_size
from huarizo.kernels.build import load as load_kernel
from huarizo.recipe import Recipe, to_yaml
from huarizo.recipe_file import parse_yaml
from huarizo.training.checkpoint import Checkpoint

LIBRARIES = ("huarizo", "torch", "transformers", "peft", "accelerate")
INSTRUCTIONS = {"avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"}
"""What the CPU has of these decides which products torch and the kernels use, and so how sums are rounded."""
NO_MATTER = {
    "model", "data.train", "output", "samples", "training.eval_every",
    "training.save_every", "training.save_minutes", "training.keep", "training.max_minutes",
}  # fmt: skip
"""Settings on which no number of the training depends; of model and data, the pinned digests count, not the place."""
ONLY_ROUNDING = {"training.micro_batch_tokens", "training.compile", "trainer.gradient_checkpointing", "precision"}
"""Settings that the machine may choose, and that change how it is computed."""
OTHER_RUN = ("data.", "pinned.", "lora.", "training.", "trainer.")
"""Beginnings of settings without which it is another run, but for those of the next line.

A checkpoint holds the optimizer's own settings and the schedule's, so another learning rate, weight decay, optimizer or
warm-up would not be used, or only in part.
"""
STILL_THIS_RUN = {
    "data.on_bad_row", "data.eval", "lora.dropout", "training.epochs", "training.max_steps", "trainer.max_grad_norm",
    "trainer.logging_steps", "trainer.logging_strategy", "trainer.logging_first_step", "trainer.report_to",
    "trainer.run_name",
}  # fmt: skip
"""Settings that are used as they are now, from the checkpoint's step on."""


def facts_of(recipe: Recipe, data_fingerprint: str, precision: str, device: torch.device) -> dict[str, Any]:
    """For the manifest: JSON values that tell this recipe, data, base and machine from others."""
    return {
        "recipe": _digest(_flat(to_yaml(recipe))),
        "base": _digest(recipe.pinned.get("model", {})),
        "data": data_fingerprint,
        "precision": precision,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "instructions": sorted(cpu_flags() & INSTRUCTIONS) if device.type == "cpu" else [],
        "kernels": _kernels(precision) if device.type == "cpu" else [],
        "threads": torch.get_num_threads(),
        "processes": world_size(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
    }


def _kernels(precision: str) -> list[str]:
    """The kernels in C that a training on this CPU can use."""
    wanted = ("attention", "dropout", *(("int8",) if precision == "int8" else ()))
    return [name for name in wanted if not isinstance(load_kernel(name), str)]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _flat(yaml: str) -> dict[str, Any]:
    """A resolved recipe's settings by dotted key, without those on which nothing depends."""

    def walk(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            elif prefix + key not in NO_MATTER:
                yield prefix + key, value

    return dict(walk(parse_yaml(yaml), ""))


def same_training(one: Recipe, other: Recipe) -> bool:
    """Whether two resolved recipes train the same thing. The day may differ: a run that goes on keeps its own."""
    flat = [_flat(to_yaml(recipe)) for recipe in (one, other)]
    settings = (flat[0].keys() | flat[1].keys()) - ONLY_ROUNDING - {"data.date"}
    return all(flat[0].get(key) == flat[1].get(key) for key in settings)


def compare(checkpoint: Checkpoint, recipe: Recipe, now: dict[str, Any]) -> list[str]:
    """What has changed since the checkpoint and is worth telling.

    now: the `facts_of` this moment.

    Raises:
        UserError: with what is here now it would be another run.
    """
    then = checkpoint.manifest
    before, after = _flat(checkpoint.files["recipe.yaml"].decode()), _flat(to_yaml(recipe))
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    harmless = STILL_THIS_RUN | ONLY_ROUNDING
    harmful = [key for key in changed if key.startswith(OTHER_RUN) and key not in harmless]
    reasons = [f"{key} was {before.get(key)!r} and is {after.get(key)!r}" for key in harmful]
    if not harmful:
        reasons += ["the base model is another one"] if then["base"] != now["base"] else []
        reasons += ["the rows, or the way they become tokens, are others"] if then["data"] != now["data"] else []
    if reasons:
        raise UserError(
            f"{checkpoint.path}: can't be gone on with: {'; '.join(reasons)}. Put it back as it was, or start a new "
            "run with huarizo train"
        )
    told = [f"{key} was {before.get(key)!r} and is {after.get(key)!r}" for key in changed]
    for key in ("precision", "device", "instructions", "kernels", "threads", "processes"):
        if then.get(key) != now[key]:
            told.append(f"{key}: {_in_words(then.get(key))} then, {_in_words(now[key])} now")
    for name, number in now["versions"].items():
        if then["versions"].get(name) != number:
            told.append(f"{name} {then['versions'].get(name)} then, {number} now")
    return list(dict.fromkeys(told))


def compared_compilation(checkpoint: Checkpoint, reason: str | None) -> str | None:
    """What to tell where layers were compiled at the checkpoint and are not now, or the other way round.

    reason: why they are not compiled now; None: they are.
    """
    then = checkpoint.manifest.get("compiled")
    if then is None or then == (reason is None):
        return None
    return "layers: not compiled then, compiled now" if not then else f"layers: compiled then, not now: {reason}"


def _in_words(value: Any) -> str:
    return (" ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)
