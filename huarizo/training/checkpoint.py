"""A checkpoint: everything that the next step depends on, in safetensors and JSON, complete or absent.

    step-000120/
      adapter_model.safetensors   LoRA weights          rng.safetensors      torch's generators (CPU, each card)
      optimizer.safetensors       moments by parameter  state.json           scheduler, scaler, Python's and NumPy's RNG
      trainer_state.json          step, epoch, history  manifest.json        sha256 of each file, written last

The folder is written beside its place and renamed there in one step. Nothing in it is a pickle.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from huarizo.errors import UserError
from huarizo.files import sha256_of, whole_folder

MANIFEST = "manifest.json"


def folder_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:06d}"


def newest_valid(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint of the highest step whose files are all as its manifest says, and the faults of newer ones."""
    damaged = []
    for folder in sorted(checkpoints.glob("step-*"), key=_step_of, reverse=True):
        fault = fault_of(folder)
        if fault is None:
            return folder, damaged
        damaged.append(f"{folder.name}: {fault}")
    return None, damaged


def _step_of(folder: Path) -> int:
    number = folder.name.removeprefix("step-")
    return int(number) if number.isdecimal() else -1


def fault_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, digest in manifest["files"].items():
            if sha256_of(folder / name) != digest:
                return f"{name} is not as it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "its manifest can't be read"
    return None


def save(folder: Path, model: Any, optimizer: Any, scheduler: Any, scaler: Any, trainer_state: Any) -> None:
    """Write a checkpoint in one step. `scaler` may be None.

    Raises:
        MachineError: the disk is full or can't be written; nothing that was there is damaged.
    """
    with whole_folder(folder) as temporary:
        weights = get_peft_model_state_dict(model, save_embedding_layers=False)
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in weights.items()},
            temporary / "adapter_model.safetensors",
        )
        tensors, groups = _split(optimizer.state_dict())
        save_file(tensors, temporary / "optimizer.safetensors")
        save_file(_rng_tensors(), temporary / "rng.safetensors")
        numpy_state: Any = np.random.get_state(legacy=False)
        numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
        state = {
            "optimizer_groups": groups,
            "scheduler": scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "python_rng": random.getstate(),
            "numpy_rng": numpy_state,
        }
        (temporary / "state.json").write_text(json.dumps(state))
        trainer_state.save_to_json(str(temporary / "trainer_state.json"))
        files = {file.name: sha256_of(file) for file in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps({"torch": torch.__version__, "files": files}, indent=1))


def _split(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """An optimizer's state as tensors named `parameter.key`, and its groups as plain values."""
    tensors = {}
    for parameter, values in state["state"].items():
        for key, value in values.items():
            tensors[f"{parameter}.{key}"] = torch.as_tensor(value).detach().contiguous()
    return tensors, state["param_groups"]


def _rng_tensors() -> dict[str, torch.Tensor]:
    cards = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), **{f"cuda.{i}": state for i, state in enumerate(cards)}}


def load_weights(folder: Path, model: Any) -> None:
    """Put the LoRA weights of a checkpoint into the model.

    Raises:
        UserError: the checkpoint's adapter has other matrices than the model's.
    """
    weights = load_file(folder / "adapter_model.safetensors")
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in expected.items()}:
        raise UserError(
            f"{folder}: the checkpoint has another LoRA than the recipe. Start a new run for another adapter"
        )
    set_peft_model_state_dict(model, weights)


def load_optimizer(folder: Path, optimizer: Any, scheduler: Any, scaler: Any) -> None:
    """Restore optimizer, scheduler and loss scaler."""
    state = _state(folder)
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(folder / "optimizer.safetensors").items():
        parameter, _, key = name.partition(".")
        moments.setdefault(int(parameter), {})[key] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": state["optimizer_groups"]})
    scheduler.load_state_dict(state["scheduler"])
    if scaler is not None and state["scaler"] is not None:
        scaler.load_state_dict(state["scaler"])


def load_rng(folder: Path) -> None:
    """Restore the random number generators of Python, NumPy and torch."""
    state = _state(folder)
    version, internal, gauss = state["python_rng"]
    random.setstate((version, tuple(internal), gauss))
    numpy_state = state["numpy_rng"]
    numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state)
    tensors = load_file(folder / "rng.safetensors")
    torch.set_rng_state(tensors.pop("cpu"))
    if torch.cuda.is_available():
        for name, tensor in tensors.items():
            torch.cuda.set_rng_state(tensor, int(name.partition(".")[2]))


def _state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))
