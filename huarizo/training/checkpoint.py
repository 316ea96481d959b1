"""Checkpoints: everything the next step depends on, in safetensors and JSON, each one complete or absent.

    step-000120/
      adapter_model.safetensors   LoRA weights            trainer_state.json   step, epoch, history
      optimizer.safetensors       moments by parameter    metrics.jsonl        rows logged so far
      rng.safetensors             torch's generators      samples.jsonl        the answers before
      recipe.yaml                 the resolved recipe
      state.json                  scheduler, loss scaler, Python's and NumPy's generators, the loss watch
      manifest.json               sha256 and size of each file, facts about the run; written last

A checkpoint is built in memory, written under a temporary name, flushed file by file, renamed in one step, and read
back before older ones are deleted. It holds no pickle. A name is never reused, and the bytes that are loaded are the
same bytes that were compared with the manifest.
"""

import hashlib
import json
import math
import random
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensor_bytes

from huarizo.errors import MachineError, UserError
from huarizo.files import discard, read_own, remove_leftovers, write_folder, writing
from huarizo.plan import Batching
from huarizo.training.divergence import WatchState

MANIFEST = "manifest.json"
NAME = re.compile(r"step-(\d{6,})(-\d+)?")
DAMAGED = "damaged-"
JsonObject = dict[str, Any]
"""A JSON object, as `json.loads` returns it."""


@dataclass(frozen=True)
class Trained:
    """The objects whose state a checkpoint saves and restores. `scaler` is None without loss scaling."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any  # the libraries have several types for it
    scaler: torch.amp.GradScaler | None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified. `files` holds the content of each file by name."""

    path: Path
    manifest: JsonObject
    files: dict[str, bytes]

    @property
    def step(self) -> int:
        return self.manifest["step"]

    @property
    def metrics(self) -> list[JsonObject]:
        """The rows of metrics.jsonl up to this step."""
        return [json.loads(line) for line in self.files["metrics.jsonl"].splitlines()]

    @property
    def batching(self) -> Batching:
        """How examples went through the model. Older checkpoints don't say it: they are of packed ones."""
        return self.manifest.get("batching", "packed")

    @property
    def watched(self) -> WatchState:
        """The state of the `LossWatch`."""
        return self._state["watched"]

    def micro_batch(self, planned: int) -> int:
        """Micro-batch size in tokens: the reduced one, if memory ran out before under the same plan, else `planned`."""
        then = self.manifest.get("micro_batch", {})
        return then["used"] if then.get("planned") == planned else planned

    @property
    def _state(self) -> JsonObject:
        return json.loads(self.files["state.json"])

    def restore_weights(self, model: torch.nn.Module) -> None:
        """Load the LoRA weights into the model.

        Raises:
            UserError: the checkpoint's LoRA differs from the model's in names or shapes.
        """
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        weights = load_tensors(self.files["adapter_model.safetensors"])
        expected = get_peft_model_state_dict(model, save_embedding_layers=False)
        if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in expected.items()}:
            raise UserError(
                f"{self.path}: the checkpoint's LoRA is not the recipe's. To train another adapter, start a new run"
            )
        set_peft_model_state_dict(model, weights)

    def restore_optimizer(self, trained: Trained) -> None:
        """Restore optimizer, scheduler and loss scaler."""
        state = self._state
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in load_tensors(self.files["optimizer.safetensors"]).items():
            parameter, _, key = name.partition(".")
            moments.setdefault(int(parameter), {})[key] = tensor
        trained.optimizer.load_state_dict({"state": moments, "param_groups": state["optimizer_groups"]})
        trained.scheduler.load_state_dict(state["scheduler"])
        if trained.scaler is not None and state["scaler"] is not None:
            trained.scaler.load_state_dict(state["scaler"])

    def restore_generators(self, rank: int) -> None:
        """Restore the random generators of Python, NumPy and torch, the last for the CPU and each GPU.

        With more GPUs now than were saved, the others are left alone. A process with no saved generators takes those of
        process 0, which is also how a new run starts.
        """
        state = self._state
        version, internal, gauss = state["python_rng"]
        random.setstate((version, tuple(internal), gauss))
        numpy_state = state["numpy_rng"]
        numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
        np.random.set_state(numpy_state)
        tensors = load_tensors(self.files["rng.safetensors"])
        mine = tensors.get(f"process.{rank}", tensors["process.0"])
        cpu, cards = mine[: state["cpu_rng_bytes"]], mine[state["cpu_rng_bytes"] :]
        torch.set_rng_state(cpu)
        if torch.cuda.is_available() and len(cards):
            saved = cards.split(len(torch.cuda.get_rng_state()))
            for number, generator in zip(range(torch.cuda.device_count()), saved, strict=False):
                torch.cuda.set_rng_state(generator, number)


def generators() -> torch.Tensor:
    """States of this process's torch generators, first the CPU's and then each GPU's: uint8 [bytes]."""
    cards = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return torch.cat([torch.get_rng_state(), *cards])


def contents(trained: Trained, rng: list[torch.Tensor], watched: WatchState) -> dict[str, bytes]:
    """The files that hold the training state, by name.

    rng: `generators` of each process, by rank; watched: the state of the `LossWatch`.
    """
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(trained.model, save_embedding_layers=False)
    tensors, groups = _split(trained.optimizer.state_dict())
    numpy_state: Any = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    state = {
        "optimizer_groups": groups,
        "scheduler": trained.scheduler.state_dict(),
        "scaler": trained.scaler.state_dict() if trained.scaler is not None else None,
        "python_rng": random.getstate(),
        "numpy_rng": numpy_state,
        "cpu_rng_bytes": len(torch.get_rng_state()),
        "watched": watched,
    }
    return {
        "adapter_model.safetensors": tensor_bytes({n: t.detach().cpu().contiguous() for n, t in weights.items()}),
        "optimizer.safetensors": tensor_bytes(tensors),
        "rng.safetensors": tensor_bytes({f"process.{number}": state for number, state in enumerate(rng)}),
        "state.json": json.dumps(state).encode(),
    }


def _split(state: JsonObject) -> tuple[dict[str, torch.Tensor], list[JsonObject]]:
    """An optimizer's state as tensors named `PARAMETER.KEY`, and its parameter groups as plain values."""
    tensors = {}
    for parameter, values in state["state"].items():
        for key, value in values.items():
            tensors[f"{parameter}.{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return tensors, state["param_groups"]


def space_needed(trainable: int, keep: int) -> int:
    """Upper bound of the bytes that checkpoints and adapter take on disk.

    trainable: number of LoRA parameters. Weight and two moments are saved in fp32; a few MB are for the history.
    """
    return (12 * trainable + 8_000_000) * (keep + 3) + 4 * trainable + 20_000_000


def save(checkpoints: Path, step: int, files: Mapping[str, bytes], facts: Mapping[str, object], keep: int) -> Path:
    """Write a checkpoint, read it back, and then delete older ones.

    The newest `keep` are kept, and the best by held-out loss and by running loss.

    facts: more entries of the manifest. `heldout_loss` and `running_loss` (either may be None) rank the checkpoints.

    Raises:
        MachineError: the disk is full, can't be written, or returns other bytes. Older checkpoints are untouched.
    """
    manifest = {
        "format": 1,
        "step": step,
        **facts,
        "files": {n: {"sha256": hashlib.sha256(c).hexdigest(), "size": len(c)} for n, c in files.items()},
    }
    manifest["sha256"] = _digest(manifest)
    path = _free_name(checkpoints, step)
    write_folder(path, {**files, MANIFEST: json.dumps(manifest, indent=1).encode()})
    if fault := fault_of(path):
        raise MachineError(f"{path}: the disk does not return what was written ({fault}). Use another disk")
    remove_leftovers(checkpoints)
    with suppress(OSError):  # retried after the next checkpoint
        _prune(checkpoints, keep)
    return path


def _free_name(checkpoints: Path, step: int) -> Path:
    """`step-000120`, or `step-000120-2` if the name is taken, whether by a whole, damaged or partial checkpoint."""
    taken = {entry.name.removeprefix(DAMAGED) for entry in checkpoints.iterdir()} if checkpoints.is_dir() else set()
    name, number = f"step-{step:06d}", 2
    while name in taken:
        name, number = f"step-{step:06d}-{number}", number + 1
    return checkpoints / name


def _prune(checkpoints: Path, keep: int) -> None:
    """Delete all but the newest `keep` by step, the best by held-out loss and the best by running loss."""
    folders = newest_first(checkpoints)
    kept = set(folders[:keep])
    for key in ("heldout_loss", "running_loss"):
        facts = {folder: _fact(folder, key) for folder in folders}
        losses = {f: loss for f, loss in facts.items() if isinstance(loss, int | float) and math.isfinite(loss)}
        if losses:
            kept.add(min(losses, key=lambda folder: losses[folder]))
    for folder in folders:
        if folder not in kept:
            discard(folder)


def _fact(folder: Path, key: str) -> object:
    try:
        return _manifest(folder).get(key)
    except _DamagedError:
        return None


def newest_first(checkpoints: Path) -> list[Path]:
    """All checkpoints, whole or not, the highest step first. The order is by name, never by file time."""
    found = [(match, entry) for entry in _entries(checkpoints) if (match := NAME.fullmatch(entry.name))]
    found.sort(key=lambda pair: (int(pair[0][1]), -int(pair[0][2] or -1)), reverse=True)
    return [entry for _, entry in found]


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name; -1 for other names."""
    match = NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def newest_valid(checkpoints: Path, set_aside: bool = True) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose files all match its manifest, or None, and the faults of newer ones.

    set_aside: rename the damaged ones to `damaged-...`.
    """
    damaged = []
    for folder in newest_first(checkpoints):
        try:
            manifest = _manifest(folder)
            return Checkpoint(folder, manifest, dict(_verified(folder, manifest))), damaged
        except _DamagedError as fault:
            damaged.append(f"{folder.name}: {fault}")
        with writing(folder):
            if set_aside:
                folder.rename(folder.with_name(DAMAGED + folder.name))
    return None, damaged


def fault_of(folder: Path) -> str | None:
    """Describe what is wrong with a checkpoint; None if it is whole. One file at a time is held in memory."""
    try:
        for _ in _verified(folder, _manifest(folder)):
            pass
    except _DamagedError as fault:
        return str(fault)
    return None


class _DamagedError(Exception):
    """A checkpoint is not what was written."""


def _verified(folder: Path, manifest: JsonObject) -> Iterator[tuple[str, bytes]]:
    """Each file's name and content, verified against the manifest."""
    for name, file in manifest["files"].items():
        try:
            content = read_own(folder / name)
        except FileNotFoundError:
            raise _DamagedError(f"{name} is missing") from None
        except OSError as error:
            raise _DamagedError(f"{name} can't be read: {error.strerror or error}") from None
        if hashlib.sha256(content).hexdigest() != file["sha256"]:
            raise _DamagedError(f"{name} is not as it was written")
        yield name, content


def _manifest(folder: Path) -> JsonObject:
    """The manifest, verified to be intact and to belong to this folder."""
    try:
        manifest = json.loads(read_own(folder / MANIFEST))
        digest = manifest.pop("sha256")
        step = manifest["step"]
    except FileNotFoundError:
        raise _DamagedError(f"{MANIFEST} is missing") from None
    except OSError as error:
        raise _DamagedError(f"{MANIFEST} can't be read: {error.strerror or error}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _DamagedError("its manifest can't be read") from None
    if digest != _digest(manifest):
        raise _DamagedError("its manifest is not as it was written")
    match = NAME.fullmatch(folder.name)
    if match is None or int(match[1]) != step:
        raise _DamagedError(f"its manifest belongs to step {step}")
    return manifest


def _digest(manifest: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
