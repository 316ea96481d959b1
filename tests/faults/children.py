"""Runs of a tiny model in forked children, so that each can be killed and costs no second of imports."""

import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

from huarizo.commands.main import main
from huarizo.training.checkpoint import newest_first, newest_valid, step_of
from tests.faults.operations import Operations
from tests.tiny import make_model, make_tokenizer

ROWS, STEPS, SAVE_EVERY = 24, 12, 3
RECIPE = """
model: {folder}/model
data: {{train: {folder}/rows.json, eval: 4, prompt: alpaca, max_length: 64}}
lora: {{dropout: 0.1}}
training: {{epochs: 2, batch_size: 4, save_every: {every}, save_minutes: null, keep: 2, eval_every: 4, compile: false,
  micro_batch_tokens: 64}}
precision: {precision}
samples: 1
"""


@dataclass
class Lab:
    """A folder with a tiny model, rows and a recipe, and what an undisturbed run of it gives."""

    folder: Path
    expected: dict[str, Any]
    operations: int
    seconds: float


def make_lab(folder: Path, precision: str = "fp32") -> Lab:
    """Make the inputs and the undisturbed run."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    make_model(initializer_range=0.1).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    rows = [{"instruction": f"Count to {n}", "input": "", "output": " ".join(map(str, range(n)))} for n in range(ROWS)]
    (folder / "rows.json").write_text(json.dumps([row | {"output": row["output"] or "0"} for row in rows]))
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder, every=SAVE_EVERY, precision=precision))
    lab = Lab(folder, {}, 0, 0.0)
    for name in ("warm", "whole"):
        began = time.monotonic()
        assert finish(lab, folder / name) == 0, (folder / name / "log").read_text()
        lab.seconds = time.monotonic() - began
    lab.expected = outcome(folder / "whole")
    lab.operations = int((folder / "whole" / "operations").read_text())
    return lab


def outcome(run: Path) -> dict[str, Any]:
    """What has to be the same, however often the run was stopped."""
    metrics = [json.loads(line) for line in (run / "run" / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "epoch", "loss", "lr", "grad_norm", "tokens", "eval_loss")
    adapter = (run / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    return {
        "adapter": hashlib.sha256(adapter).hexdigest(),
        "metrics": [{key: row[key] for key in kept if key in row} for row in metrics],
        "rows": dict(line.split(" ", 1) for line in (run / "rows").read_text().splitlines()),
        "samples": (run / "run" / "samples.jsonl").read_text(),
    }


def start(run: Path, recipe: Path, before: Any = None) -> int:
    """Fork a child that trains, or goes on where a run is there. Returns its pid."""
    run.mkdir(exist_ok=True)
    begun = (run / "run" / "recipe.yaml").is_file()
    return _fork(run, ["resume", f"{run}/run"] if begun else ["train", str(recipe), f"output={run}/run"], before)


def call(place: Path, arguments: list[str]) -> tuple[int, str]:
    """Run a command in a child: its exit status, and what it said."""
    (place / "log").unlink(missing_ok=True)
    return ended(_fork(place, arguments)), (place / "log").read_text()


def _fork(place: Path, arguments: list[str], before: Any = None) -> int:
    if pid := os.fork():
        return pid
    status = 70
    try:
        log = os.open(place / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(place)
        operations = Operations(before)
        log_rows(place / "rows")
        sys.argv = ["huarizo", *arguments]
        try:
            main()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(bool(end.code))
        (place / "operations").write_text(str(len(operations.done)))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def log_rows(file: Path) -> None:
    """Note for each step that begins which rows are in it."""
    from huarizo.training.trainer import LoraTrainer

    plain = LoraTrainer.training_step

    def noted(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        with file.open("a") as log:
            rows = [zlib.crc32(repr([int(i) for i in example.input_ids]).encode()) for example in inputs.examples]
            log.write(f"{self.state.global_step} {rows}\n")
        return plain(self, model, inputs, num_items_in_batch)

    LoraTrainer.training_step = noted


def ended(pid: int) -> int:
    """Wait for a child; its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def finish(lab: Lab, run: Path) -> int:
    """Train or go on to the end."""
    return ended(start(run, lab.folder / "recipe.yaml"))


def kill_after(pid: int, seconds: float) -> int:
    """SIGKILL a child at that instant, if it still runs."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(min(0.002, max(0.0, deadline - time.monotonic())))
    os.kill(pid, signal.SIGKILL)
    return ended(pid)


def check_after_kill(run: Path) -> None:
    """What was promised is there, and no more is lost than the steps since the last save."""
    log = (run / "log").read_text() if (run / "log").is_file() else ""
    promised = [int(line.split()[2]) for line in log.splitlines() if line.startswith("saved step")]
    checkpoints = run / "run" / "checkpoints"
    checkpoint, _ = newest_valid(checkpoints, set_aside=False)
    newest = checkpoint.step if checkpoint else 0
    assert newest >= max(promised, default=0), f"step {max(promised)} was promised, {newest} is there"
    begun = (run / "rows").read_text().splitlines() if (run / "rows").is_file() else []
    lost = max((int(line.split()[0]) for line in begun), default=0) - newest
    assert lost <= SAVE_EVERY, f"{lost} steps are lost"
    assert all(step_of(folder) >= 0 for folder in newest_first(checkpoints))


def check_outcome(lab: Lab, run: Path) -> None:
    """The result is that of the undisturbed run, byte for byte; nothing half written is left."""
    steps = [line.split(" ", 1) for line in (run / "rows").read_text().splitlines()]
    assert all(lab.expected["rows"][step] == rows for step, rows in steps), "other rows than in the undisturbed run"
    got = outcome(run)
    assert got == lab.expected, {key: (got[key], lab.expected[key]) for key in got if got[key] != lab.expected[key]}
    leftovers = [path.name for path in (run / "run").rglob(".*") if path.name != ".lock"]
    assert not leftovers, leftovers


def one_case(lab: Lab, run: Path, kill: Callable[[Path], int]) -> None:
    """Disturb a run, look at what is left, finish it, and compare."""
    kill(run)
    check_after_kill(run)
    if not (run / "run" / "loss.png").is_file():
        assert finish(lab, run) == 0, (run / "log").read_text()[-2000:]
    check_outcome(lab, run)


def random_kill(lab: Lab, seed: int) -> Callable[[Path], int]:
    moment = random.Random(seed).uniform(0, lab.seconds)
    return lambda run: kill_after(start(run, lab.folder / "recipe.yaml"), moment)
