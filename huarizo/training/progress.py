"""What a run shows while it goes: a live line on a terminal, plain lines elsewhere, and metrics.jsonl as it happens.

Tokens are those of the rows, which is all there are: nothing is padded. Tokens a second count the time inside
optimizer steps, without evaluation and saving, and without the first step as soon as there is a second: it compiles.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text
from transformers import TrainerCallback

from huarizo.files import append_line, write_whole
from huarizo.host import rank
from huarizo.machine import peak_memory
from huarizo.model.compile import seconds_compiling

PLAIN_SECONDS = 10  # between two lines where there is no terminal


def duration(seconds: float) -> str:
    """`1:02:03`, `2:03` or `0:03`."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Metrics:
    """metrics.jsonl: appended line by line; the rows in memory, which every checkpoint holds too, are what counts."""

    def __init__(self, path: Path, rows: list[dict[str, Any]] | None = None) -> None:
        """`rows` are those of the checkpoint that a run goes on from."""
        self.path, self.rows = path, list(rows or [])
        self.unwritten: OSError | None = None
        if rank() == 0:
            write_whole(path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if rank():
            return
        try:
            append_line(self.path, json.dumps(row))
        except OSError as error:
            self.unwritten = error

    def complete(self) -> None:
        """Write the whole file anew where a line could not be written.

        Raises:
            MachineError: it still can't.
        """
        if self.unwritten is not None and rank() == 0:
            write_whole(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
            self.unwritten = None


def _finite(value: float | None) -> float | None:
    """The value where it is a number that JSON knows."""
    return value if value is not None and math.isfinite(value) else None


class ShowProgress(TrainerCallback):
    """Shows each logged step on the console and appends it to the metrics."""

    def __init__(self, metrics: Metrics, console: Console, device: torch.device, trainer: Any) -> None:
        self.metrics, self.console, self.device, self.trainer = metrics, console, device, trainer
        self.elapsed_before = max((row.get("elapsed_s") or 0 for row in metrics.rows), default=0)
        self.told_unwritten = False
        self.seconds, self.tokens, self.steps = 0.0, 0, 0  # in optimizer steps since training began or went on
        self.last_line = 0.0
        self.bar: Progress | None = None
        self.task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()
        self.tokens_before = state.num_input_tokens_seen
        if self.console.is_terminal:
            columns = (
                TextColumn("training"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total} {task.description}"),
            )
            self.bar = Progress(*columns, console=self.console, transient=True)
            self.bar.start()
            self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.steps == 1:
            self.seconds, self.tokens_before = 0.0, self.tokens_before + self.tokens
        self.seconds += time.perf_counter() - self.step_began
        self.steps += 1
        self.tokens = state.num_input_tokens_seen - self.tokens_before
        if self.steps == 1 and (compiling := seconds_compiling()) >= 1:
            self.console.print(f"{'compiled':<10} in {compiling:.0f} s, which the next run saves for the most part")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not logs or not ({"loss", "eval_loss"} & logs.keys()):
            return
        row: dict[str, Any] = {"step": state.global_step, "epoch": round(state.epoch or 0, 4)}
        if "eval_loss" in logs:
            row["eval_loss"] = _finite(logs["eval_loss"])
        else:
            row |= {
                "loss": _finite(logs["loss"]),
                "lr": logs["learning_rate"],
                "grad_norm": _finite(logs.get("grad_norm")),
                "tokens": state.num_input_tokens_seen,
                "tokens_per_second": round(self.tokens / self.seconds, 1) if self.seconds else None,
                "elapsed_s": round(self.elapsed_before + time.perf_counter() - self.began, 1),
                "eta_s": self._eta(state),
                "memory_gb": round(peak_memory(self.device) / 1e9, 2),
            }
            skipped = self.trainer.watch.skipped
            row |= {"skipped_steps": skipped} if skipped else {}
        self.metrics.add(row)
        if self.metrics.unwritten and not self.told_unwritten:
            self.told_unwritten = True
            self.console.print(Text(f"{self.metrics.path}: {self.metrics.unwritten}. Going on without it", "yellow"))
        self._show(row, state.max_steps)

    def _eta(self, state: Any) -> float | None:
        """Seconds to the last step; None in the first step, whose time is that of compilation."""
        if self.steps < 2:
            return None
        return round((state.max_steps - state.global_step) * self.seconds / (self.steps - 1), 1)

    def _show(self, row: dict[str, Any], max_steps: int) -> None:
        if "eval_loss" in row:
            loss = "not finite" if row["eval_loss"] is None else f"{row['eval_loss']:.4f}"
            self.console.print(f"step {row['step']}: held-out loss {loss}")
            return
        loss = "not finite, step left out" if row["loss"] is None else f"{row['loss']:.4f}"
        left = f", {duration(row['eta_s'])} left" if row["eta_s"] is not None else ""
        line = (
            f"loss {loss}  lr {row['lr']:.1e}  {row['tokens_per_second'] or 0:.0f} tokens/s  "
            f"{duration(row['elapsed_s'])} gone{left}  {row['memory_gb']:.1f} GB"
        )
        if self.bar is not None:
            self.bar.update(self.task, completed=row["step"], description=line)
        elif row["step"] in (1, max_steps) or time.perf_counter() - self.last_line >= PLAIN_SECONDS:
            self.last_line = time.perf_counter()
            self.console.print(f"step {row['step']}/{max_steps}  {line}", soft_wrap=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
