"""Starts the processes of `train_speed.py` and reads what they measured; what they print goes into a file.

Whatever takes much memory runs in a process of its own and not in the parent, because Linux counts the memory of a
parent towards the peak of the processes that it starts.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from contenders import ON_CARD_ONLY, Task

from huarizo.host import cache_folder

HERE = Path(__file__).parent
TOLD_LINES = 15  # of what a failed process printed last


class ContenderError(Exception):
    """A contender's run failed; the message holds its last lines."""


def why_left_out(name: str, only: Sequence[str], trl_path: str | None) -> str | None:
    """The reason why a contender does not run; None if it does."""
    if name not in only:
        return "not asked for"
    if name in ON_CARD_ONLY and not torch.cuda.is_available():
        return "it needs an NVIDIA GPU"
    package = "trl" if name == "trl" else ON_CARD_ONLY.get(name)
    if not package or importlib.util.find_spec(package) or (trl_path and Path(trl_path, package).is_dir()):
        return None
    where = f" in {trl_path}" if trl_path else ""
    return f"{package} is not installed{where}. `pip install --no-deps --target FOLDER {package}`, --trl-path FOLDER"


def environment() -> dict[str, str]:
    """Of the processes: one card, if any, so that no Trainer spreads over several."""
    return {"CUDA_VISIBLE_DEVICES": "0", "TOKENIZERS_PARALLELISM": "false", **os.environ}


def run_contender(name: str, task: Task, folder: Path) -> dict[str, Any]:
    """What `contenders.py` measured, and `end_to_end_seconds`, from the start of its process to its end.

    Raises:
        ContenderError: the run failed.
    """
    config, result, log = folder / "config.json", folder / "result.json", folder / f"{name}.log"
    config.write_text(json.dumps(dataclasses.asdict(task)))
    result.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / "contenders.py"), name, str(config), str(result)]
    with log.open("w") as output:
        began = time.perf_counter()
        ended = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment())
        seconds = time.perf_counter() - began
    if ended.returncode or not result.is_file():
        last = log.read_text(errors="replace").splitlines()[-TOLD_LINES:]
        raise ContenderError("\n  ".join([f"it ended with status {ended.returncode}", *last]))
    return json.loads(result.read_text()) | {"end_to_end_seconds": seconds}


def measure_gemm(model: str, tokens: int) -> dict[str, float]:
    """10^9 operations a second by dtype, at the model's own shapes."""
    command = [sys.executable, str(HERE / "gemm.py"), model, str(tokens)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment()).stdout)


def random_model(tokenizer: Path) -> Path:
    """The folder of TinyLlama's shape with random weights, made where it is not there yet."""
    folder = cache_folder() / "benchmarks" / "tinyllama-shape"
    if not (folder / "config.json").is_file():
        print(f"making random weights in {folder}", file=sys.stderr, flush=True)
        command = [sys.executable, str(HERE / "random_model.py"), str(folder), str(tokenizer)]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True, env=environment())
    return folder
