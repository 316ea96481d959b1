"""What happens around each optimizer step, in order.

Transformers' Trainer runs the loop. It calls `on_step_begin`, computes the step (`LoraTrainer.training_step`), calls
`on_step_end`, and then logs, evaluates and saves if that is due. The callback here times each step, watches its loss,
decides whether to save or stop, and reports events. Tokens per second count time inside optimizer steps only, without
evaluation and saving. The first step, which compiles, is left out once there is a second one.
"""

import math
import time
from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from huarizo.events import Compiled, Evaluated, Skipped, Started, Step
from huarizo.host import world_size
from huarizo.machine import peak_memory
from huarizo.model.compile import seconds_compiling
from huarizo.training.checkpoint import generators
from huarizo.training.divergence import DivergedError, likely_cause

if TYPE_CHECKING:
    from huarizo.training.trainer import LoraTrainer


class StepClock:
    """Times optimizer steps since training started or resumed. `tokens` counts the tokens of the rows."""

    def __init__(self) -> None:
        self.seconds, self.tokens, self.steps = 0.0, 0, 0
        self.began = self.step_began = time.perf_counter()
        self.longest = 0.0
        self._tokens_before = 0

    def start(self, tokens_before: int) -> None:
        """Training starts or resumes, with this many tokens already trained on."""
        self.began, self._tokens_before = time.perf_counter(), tokens_before

    def step_begins(self) -> None:
        self.step_began = time.perf_counter()

    def step_ends(self, tokens: int) -> None:
        """tokens: trained on so far, including those before a resume."""
        if self.steps == 1:
            self.seconds, self._tokens_before = 0.0, self._tokens_before + self.tokens
        taken = time.perf_counter() - self.step_began
        self.seconds, self.longest = self.seconds + taken, max(self.longest, taken)
        self.steps += 1
        self.tokens = tokens - self._tokens_before

    @property
    def tokens_per_second(self) -> float | None:
        return round(self.tokens / self.seconds, 1) if self.seconds else None

    def eta(self, steps_left: int) -> float | None:
        """Estimated seconds for the steps left; None until the second step, because the first one compiles."""
        return round(steps_left * self.seconds / (self.steps - 1), 1) if self.steps > 1 else None


class Loop(TrainerCallback):
    """Huarizo's only callback of a LoraTrainer. All processes of a run take the same decisions.

    Raises:
        DivergedError: the loss diverged; the message names the last checkpoint from before.
        LockLostError: another process has taken over the run.
    """

    def __init__(self, trainer: "LoraTrainer", elapsed_before: float = 0.0) -> None:
        """elapsed_before: seconds of training before the run was resumed."""
        self.trainer, self.elapsed_before, self.clock = trainer, elapsed_before, StepClock()
        self.rng: torch.Tensor | None = None  # generators after the last completed step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.clock.start(state.num_input_tokens_seen)
        if self.trainer.saver is not None:
            self.trainer.saver.start()
        self.trainer.events.add(Started(step=state.global_step, max_steps=state.max_steps))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.clock.step_begins()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.clock.step_ends(state.num_input_tokens_seen)
        self._watch_loss(state)
        self.rng = generators()
        self._save_or_stop(args, state, control)
        if self.clock.steps == 1 and (compiling := seconds_compiling()) >= 1:
            self.trainer.events.add(Compiled(seconds=round(compiling, 1)))

    def _watch_loss(self, state: TrainerState) -> None:
        trainer, step = self.trainer, state.global_step
        watch, skipped, last = trainer.watch, not trainer.last_finite, step >= state.max_steps
        wrong = watch.add(step, trainer.last_loss, skipped, trainer.scaler is not None, last)
        if skipped:
            trainer.events.add(Skipped(step=step, in_a_row=watch.skipped_in_a_row))
        if wrong:
            cause = likely_cause(watch, trainer.args.learning_rate, trainer.precision, step)
            before = trainer.saver.before(watch) if trainer.saver else "There is no earlier checkpoint"
            raise DivergedError(f"stopped at step {step}: {wrong}. {cause}. {before}")

    def _save_or_stop(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        saver, stopping, step, last = self.trainer.saver, self.trainer.stopping, state.global_step, state.max_steps
        if saver is None or stopping is None:
            return
        saver.require_held()
        reason = stopping.wanted(self.clock.longest + 2 * saver.last_cost)
        due, stop = _any_process(args.device, saver.is_due_by_time(), reason is not None)
        if stop and step < last:
            stopping.reason = reason or "another process"
            control.should_training_stop = True
        if due or stop or saver.is_due_at(step, last):
            control.should_save = True

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if self.trainer.saver is not None and self.trainer.saver.is_best((metrics or {}).get("eval_loss", math.nan)):
            control.should_save = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        step, epoch, logs = state.global_step, round(state.epoch or 0, 4), logs or {}
        if "eval_loss" in logs:
            self.trainer.events.add(Evaluated(step=step, epoch=epoch, eval_loss=_finite(logs["eval_loss"])))
        elif "loss" in logs:
            self.trainer.events.add(
                Step(
                    step=step,
                    max_steps=state.max_steps,
                    epoch=epoch,
                    loss=_finite(logs["loss"]),
                    lr=logs["learning_rate"],
                    grad_norm=_finite(logs.get("grad_norm")),
                    tokens=state.num_input_tokens_seen,
                    tokens_per_second=self.clock.tokens_per_second,
                    elapsed_s=round(self.elapsed_before + time.perf_counter() - self.clock.began, 1),
                    eta_s=self.clock.eta(state.max_steps - step),
                    memory_gb=round(peak_memory(args.device) / 1e9, 2),
                    skipped_steps=self.trainer.watch.skipped,
                )
            )


def _finite(value: float | None) -> float | None:
    """The value, or None if it is not finite, because JSON has no such numbers."""
    return value if value is not None and math.isfinite(value) else None


def _any_process(on: torch.device, *wanted: bool) -> list[bool]:
    """For each flag: is it set in any process of this run?"""
    if world_size() == 1:
        return list(wanted)
    flags = torch.tensor([int(flag) for flag in wanted], device=on)
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]
