"""When a checkpoint is written, and when a run stops before its end.

By time, because what a checkpoint is worth is time: every `save_minutes`, and more seldom where writing takes so long
that it would cost more than a hundredth of the run. Also every `save_every` steps if asked for, at the best held-out
loss, at the end, and before stopping on a signal or at `max_minutes`. None of it changes what is computed.
"""

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from transformers import TrainerCallback

from huarizo.console import PlainConsole
from huarizo.errors import MachineError
from huarizo.host import world_size
from huarizo.recipe import Recipe, to_yaml
from huarizo.training.checkpoint import Trained, contents, generators, save
from huarizo.training.divergence import LossWatch
from huarizo.training.interrupt import Signals
from huarizo.training.lock import LockLostError, RunLock
from huarizo.training.progress import Metrics

COST = 0.01  # share of the time that saving may take


class SaveAndStop(TrainerCallback):
    """Asks the Trainer for checkpoints, and to stop. All processes of a run decide alike.

    Args:
        recipe: resolved; its `training` says when.
        checkpoints: their folder.
        facts: what the manifests say of the run (`huarizo.training.compatibility`).
        metrics: the rows so far.
        console: where "saved step N" is told, which is a promise.
        signals: what was received so far.
        lock: without it nothing is written; None in tests, and in processes that don't hold it.
        began: `time.monotonic()` when the command began, from which `max_minutes` counts.
    """

    def __init__(
        self, recipe: Recipe, checkpoints: Path, facts: dict[str, Any], metrics: Metrics, console: Console,
        signals: Signals, lock: RunLock | None = None, began: float | None = None,
    ) -> None:  # fmt: skip
        self.recipe, self.checkpoints, self.facts, self.metrics = recipe, checkpoints, facts, metrics
        self.console, self.signals, self.lock = console, signals, lock
        self.began = time.monotonic() if began is None else began
        self.samples = ""  # samples.jsonl, with the answers before
        self.rng: torch.Tensor | None = None  # the generators after the last step, though the next has begun
        self.stopped: str | None = None
        self.failure: MachineError | None = None
        self.saved_step = self.tried_step = -1
        heldout = [row["eval_loss"] for row in metrics.rows if row.get("eval_loss") is not None]
        self.lowest = min(filter(math.isfinite, heldout), default=math.inf)
        self.seconds, self.saved_at, self.last_cost = 0.0, time.monotonic(), 0.0
        self.step_began = self.longest_step = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved_at = time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now, self.rng = time.monotonic(), generators()
        self.longest_step = max(self.longest_step, now - self.step_began)
        if self.lock is not None:
            self.lock.require_held()
        stop = self._reason_to_stop(now)
        due = self.recipe.training.save_minutes is not None and now - self.saved_at >= self._interval
        due, stopping = _any_process(args.device, due, stop is not None)
        last = state.global_step >= state.max_steps
        every = self.recipe.training.save_every
        if stopping and not last:
            self.stopped = stop or "another process"
            control.should_training_stop = True
        if due or stopping or last or (every and state.global_step % every == 0):
            control.should_save = True

    @property
    def _interval(self) -> float:
        """Seconds between two checkpoints by time."""
        return max((self.recipe.training.save_minutes or 0) * 60, self.last_cost / COST)

    def _reason_to_stop(self, now: float) -> str | None:
        if self.signals.received:
            return f"by {self.signals.received}"
        if isinstance(self.console, PlainConsole) and self.console.closed:
            return "because standard output was closed"
        limit = self.recipe.training.max_minutes
        needed = self.longest_step + 2 * self.last_cost
        if limit is not None and now - self.began + needed >= limit * 60:
            return f"at training.max_minutes={limit:g}"
        return None

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        loss = (metrics or {}).get("eval_loss")
        if loss is not None and math.isfinite(loss) and loss < self.lowest:
            self.lowest = loss
            control.should_save = True

    def has_heldout(self, step: int) -> bool:
        """Whether the held-out loss was measured at that step."""
        return any(row["step"] == step and "eval_loss" in row for row in self.metrics.rows)

    def write(self, trained: Trained, state: Any, rng: list[torch.Tensor], watch: LossWatch, budget: int) -> None:
        """Write the checkpoint of this step, once. If that fails, training goes on with what was saved before.

        state: the TrainerState; rng: torch's generators of each process; budget: tokens of a micro-batch, of which
        there are fewer than planned where memory gave out.

        Raises:
            LockLostError: another process has taken the run over.
        """
        step = state.global_step
        if step == self.tried_step:
            return
        began, self.tried_step = time.monotonic(), step
        heldout = [row["eval_loss"] for row in self.metrics.rows if row["step"] == step and "eval_loss" in row]
        facts = self.facts | {"heldout_loss": heldout[-1] if heldout else None, "running_loss": watch.running}
        facts |= {"micro_batch": {"planned": self.recipe.training.micro_batch_tokens, "used": budget}}
        try:
            if self.lock is not None:
                self.lock.require_folder()
            files = contents(trained, rng, watch.state()) | {
                "trainer_state.json": json.dumps(dataclasses.asdict(state)).encode(),
                "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in self.metrics.rows).encode(),
                "samples.jsonl": self.samples.encode(),
                "recipe.yaml": to_yaml(self.recipe).encode(),
            }
            save(self.checkpoints, step, files, facts, self.recipe.training.keep)
            if self.lock is not None:
                self.lock.require_folder()
        except LockLostError:
            raise
        except MachineError as error:
            self.failure = error
            kept = f"step {self.saved_step} is safe" if self.saved_step >= 0 else "no step is safe yet"
            self.console.print(Text(f"step {step} could not be saved ({error}). Going on; {kept}", "yellow"))
        else:
            self.failure, self.saved_step = None, step
            self.console.print(f"saved step {step}")
        self.saved_at = time.monotonic()
        self.last_cost = self.saved_at - began
        self.seconds += self.last_cost


def _any_process(on: torch.device, *wanted: bool) -> list[bool]:
    """For each wish: does any process of this run have it?"""
    if world_size() == 1:
        return list(wanted)
    flags = torch.tensor([int(wish) for wish in wanted], device=on)
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]
