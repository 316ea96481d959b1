"""Decides when to write a checkpoint, and when to stop a run early.

Checkpoints are written every `save_minutes`, or less often if writing would take more than a hundredth of the time;
every `save_every` steps, if set; at each new best held-out loss; at the end; and before stopping on a signal or at
`max_minutes`. None of this changes what is computed.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping

import torch
from transformers import TrainerState

from huarizo.errors import Interrupted, MachineError
from huarizo.events import Events, Saved
from huarizo.recipe import Recipe, to_yaml
from huarizo.runs import Run
from huarizo.training.checkpoint import Trained, contents, newest_first, save, step_of
from huarizo.training.divergence import LossWatch
from huarizo.training.interrupt import Signals
from huarizo.training.lock import LockLostError, RunLock
from huarizo.training.metrics import Metrics

COST = 0.01  # the largest share of the time spent on saving


class Saver:
    """Writes the checkpoints of a run. A failure is reported, and training continues; older checkpoints stay.

    Args:
        run: the run folder.
        recipe: the resolved recipe; its `training` section says when to save.
        facts: entries of each manifest that describe the run (`huarizo.training.compatibility.facts_of`).
        metrics: the rows logged so far.
        events: gets a `Saved` event only when the checkpoint is on disk and was read back.
        micro_batch_tokens: micro-batch size as planned.
        samples: content of samples.jsonl, with the answers before training.
        lock: the run's lock; None in tests, and in processes that don't hold it.
    """

    def __init__(
        self, run: Run, recipe: Recipe, facts: Mapping[str, object], metrics: Metrics, events: Events,
        micro_batch_tokens: int | None = None, samples: str = "", lock: RunLock | None = None,
    ) -> None:  # fmt: skip
        self.run, self.recipe, self.facts, self.metrics, self.events = run, recipe, facts, metrics, events
        self.planned, self.samples, self.lock = micro_batch_tokens, samples, lock
        self.failure: MachineError | None = None
        self.saved_step = self.tried_step = -1
        self.lowest = metrics.lowest_heldout
        self.seconds, self.saved_at, self.last_cost = 0.0, time.monotonic(), 0.0

    def start(self) -> None:
        """Training starts. The time to the first checkpoint counts from here."""
        self.saved_at = time.monotonic()

    def require_held(self) -> None:
        """Raises LockLostError: another process has taken over the run."""
        if self.lock is not None:
            self.lock.require_held()

    def is_due_by_time(self) -> bool:
        """Whether a checkpoint is due: `save_minutes` have passed, and saving stays below its share of the time."""
        minutes = self.recipe.training.save_minutes
        return minutes is not None and time.monotonic() - self.saved_at >= max(minutes * 60, self.last_cost / COST)

    def is_due_at(self, step: int, last: int) -> bool:
        """Whether this step is to be saved: every `save_every`-th and the last."""
        every = self.recipe.training.save_every
        return step >= last or bool(every and step % every == 0)

    def is_best(self, heldout_loss: float) -> bool:
        """Whether a held-out loss is the lowest so far. Remembers it if so."""
        if not math.isfinite(heldout_loss) or heldout_loss >= self.lowest:
            return False
        self.lowest = heldout_loss
        return True

    def write(
        self, trained: Trained, state: TrainerState, rng: list[torch.Tensor], watch: LossWatch, micro_batch_tokens: int
    ) -> None:
        """Write the checkpoint of this step, once.

        rng: torch's generators of each process, by rank.
        micro_batch_tokens: micro-batch size in use; smaller than planned if memory ran out.

        Raises:
            LockLostError: another process has taken over the run.
        """
        step = state.global_step
        if step == self.tried_step:
            return
        began, self.tried_step = time.monotonic(), step
        facts = dict(self.facts) | {"heldout_loss": self.metrics.heldout_loss(step), "running_loss": watch.running}
        facts |= {"micro_batch": {"planned": self.planned, "used": micro_batch_tokens}}
        try:
            self._require_folder()
            files = contents(trained, rng, watch.state()) | {
                "trainer_state.json": json.dumps(dataclasses.asdict(state)).encode(),
                "metrics.jsonl": self.metrics.as_text().encode(),
                "samples.jsonl": self.samples.encode(),
                "recipe.yaml": to_yaml(self.recipe).encode(),
            }
            save(self.run.checkpoints, step, files, facts, self.recipe.training.keep)
            self._require_folder()
        except LockLostError:
            raise
        except MachineError as error:
            self.failure = error
            kept = self.kept() or "no step is safe yet"
            self.events.warn(f"step {step} could not be saved ({error}). Training continues; {kept}")
        else:
            self.failure, self.saved_step = None, step
            self.events.add(Saved(step=step, seconds=round(time.monotonic() - began, 3)))
        self.saved_at = time.monotonic()
        self.last_cost = self.saved_at - began
        self.seconds += self.last_cost

    def _require_folder(self) -> None:
        if self.lock is not None:
            self.lock.require_folder()

    def kept(self) -> str:
        """Names the last saved step; "" if there is none."""
        return f"step {self.saved_step} is safe" if self.saved_step >= 0 else ""

    def before(self, watch: LossWatch) -> str:
        """Names the last checkpoint from before the loss diverged."""
        folders = newest_first(self.run.checkpoints)
        good = [folder for folder in folders if watch.skipped_in_a_row or step_of(folder) <= watch.lowest_step]
        return f"The checkpoint from before is {good[0]}" if good else "There is no earlier checkpoint"

    def ending(self, reason: str, state: TrainerState) -> Interrupted | MachineError:
        """The error that ends a run which is stopped early.

        reason: what stopped it, such as "by SIGTERM".
        """
        where = f"stopped {reason} after step {state.global_step} of {state.max_steps}"
        if self.failure is not None:
            kept = f"Step {self.saved_step} is safe" if self.saved_step >= 0 else "No step was saved"
            folder = self.run.checkpoints
            return MachineError(f"{where}, which could not be saved: {self.failure}. {kept} in {folder}")
        return Interrupted(f"{where}, which is saved. Resume with: huarizo resume {self.run.path}")


class Stopping:
    """Decides whether to stop a run before its last step, and why.

    Args:
        signals: the command's signals.
        max_minutes: limit for the whole command; None for no limit.
        began: `time.monotonic()` at the start of the command.
        reader_left: returns whether the reader of standard output has closed it.
    """

    def __init__(
        self,
        signals: Signals,
        max_minutes: float | None = None,
        began: float | None = None,
        reader_left: Callable[[], bool] = lambda: False,
    ) -> None:
        self.signals, self.max_minutes, self.reader_left = signals, max_minutes, reader_left
        self.began = time.monotonic() if began is None else began
        self.reason: str | None = None
        """Why the run stops; None while it continues."""

    def wanted(self, needed: float) -> str | None:
        """The reason to stop after this step, such as "by SIGTERM"; None to continue.

        needed: seconds to compute and save another step.
        """
        if self.signals.received:
            return f"by {self.signals.received}"
        if self.reader_left():
            return "because standard output was closed"
        limit = self.max_minutes
        if limit is not None and time.monotonic() - self.began + needed >= limit * 60:
            return f"at training.max_minutes={limit:g}"
        return None
