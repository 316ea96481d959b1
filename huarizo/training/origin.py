"""What a checkpoint depends on beside its files, and what it means when that has changed by the time a run goes on.

Another base model, other data, another LoRA or another order of the rows would make a different run of it: refused.
Other settings, versions or machines are told, because the result will not be bit-identical to the undisturbed run's.
"""

import hashlib
import json
import platform
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch

from huarizo.errors import UserError
from huarizo.host import world_size
from huarizo.recipe import Recipe, to_yaml
from huarizo.recipe_file import parse_yaml
from huarizo.training.checkpoint import Checkpoint

LIBRARIES = ("huarizo", "torch", "transformers", "peft", "accelerate")
NO_MATTER = {
    "model", "data.train", "output", "samples", "training.eval_every",
    "training.save_every", "training.save_minutes", "training.keep", "training.max_minutes",
}  # fmt: skip
"""Settings on which no number of the training depends; of model and data, the pinned digests count, not the place."""
ONLY_ROUNDING = {"training.micro_batch_tokens", "training.compile", "trainer.gradient_checkpointing", "precision"}
"""Settings that the machine may choose, and that change how it is computed."""
OTHER_RUN = ("data.", "pinned.", "lora.", "training.batch_size", "training.seed")
"""Settings, or beginnings of them, without which it is another run; but for those of the next line."""
STILL_THIS_RUN = ("lora.dropout", "lora.loraplus_lr_ratio", "data.on_bad_row", "data.eval")


def facts(recipe: Recipe, data_fingerprint: str, precision: str, device: torch.device) -> dict[str, Any]:
    """For the manifest: JSON values that tell this recipe, data, base and machine from others."""
    return {
        "recipe": _digest(_flat(to_yaml(recipe))),
        "base": _digest(recipe.pinned.get("model", {})),
        "data": data_fingerprint,
        "precision": precision,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "processes": world_size(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
    }


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
    """Whether two resolved recipes train the same thing."""
    flat = [_flat(to_yaml(recipe)) for recipe in (one, other)]
    return all(flat[0].get(key) == flat[1].get(key) for key in (flat[0].keys() | flat[1].keys()) - ONLY_ROUNDING)


def compare(checkpoint: Checkpoint, recipe: Recipe, now: dict[str, Any]) -> list[str]:
    """What has changed since the checkpoint and is worth telling.

    now: the `facts` of this moment.

    Raises:
        UserError: with what is here now it would be another run.
    """
    then = checkpoint.manifest
    before, after = _flat(checkpoint.files["recipe.yaml"].decode()), _flat(to_yaml(recipe))
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    harmful = [key for key in changed if key.startswith(OTHER_RUN) and key not in STILL_THIS_RUN]
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
    for key in ("precision", "device", "threads", "processes"):
        if then[key] != now[key]:
            told.append(f"{key}: {then[key]} then, {now[key]} now")
    for name, number in now["versions"].items():
        if then["versions"].get(name) != number:
            told.append(f"{name} {then['versions'].get(name)} then, {number} now")
    return list(dict.fromkeys(told))
