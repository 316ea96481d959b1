"""Watches the losses of a run for non-finite values and for a rising trend.

A step whose loss or gradients are not finite is skipped: weights and optimizer moments stay as they were. After too
many skipped steps in a row, or when the loss climbs, the run ends, because continuing would only waste time.
"""

import math
from collections import deque
from dataclasses import dataclass, field
from typing import TypedDict

from huarizo.errors import UserError

WINDOW = 20  # steps of the running mean
MAX_SKIPPED = 5  # steps in a row
MAX_SKIPPED_SCALED = 30  # the same with loss scaling, which first has to find its scale
CLIMB = 2.0  # a run ends at this many nats above the lowest running mean,
ABOVE_START = 0.5  # if it is also this many above the first


class DivergedError(UserError):
    """The loss of a run diverged. The message says what to try."""


class WatchState(TypedDict):
    """The state of a `LossWatch` as JSON values; `lowest` is None before the first running mean."""

    recent: list[float]
    skipped: int
    skipped_in_a_row: int
    first: float | None
    lowest: float | None
    lowest_step: int


@dataclass
class LossWatch:
    """Gets the loss of every step. Its state is part of each checkpoint."""

    recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    skipped: int = 0
    skipped_in_a_row: int = 0
    first: float | None = None
    lowest: float = math.inf
    lowest_step: int = 0

    @classmethod
    def from_state(cls, state: WatchState) -> "LossWatch":
        lowest = math.inf if state["lowest"] is None else state["lowest"]
        return cls(
            recent=deque(state["recent"], WINDOW),
            skipped=state["skipped"],
            skipped_in_a_row=state["skipped_in_a_row"],
            first=state["first"],
            lowest=lowest,
            lowest_step=state["lowest_step"],
        )

    def state(self) -> WatchState:
        """The state for a checkpoint."""
        lowest = self.lowest if math.isfinite(self.lowest) else None
        return {
            "recent": list(self.recent),
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "first": self.first,
            "lowest": lowest,
            "lowest_step": self.lowest_step,
        }

    @property
    def running(self) -> float | None:
        """Mean of the last WINDOW finite losses, in nats per token; None before there are that many."""
        return sum(self.recent) / WINDOW if len(self.recent) == WINDOW else None

    def add(self, step: int, loss: float, skipped: bool, scaled: bool = False, last: bool = False) -> str | None:
        """Record a step. Returns a description of what is wrong with the run, or None.

        skipped: loss or gradients were not finite, so the weights were not changed.
        scaled: loss scaling is on, which skips some steps while it looks for its scale.
        last: this is the run's last step. A run that only skipped steps must not end as if it had trained.
        """
        if skipped:
            self.skipped += 1
            self.skipped_in_a_row += 1
            seeking = scaled and math.isfinite(loss) and not last  # no scale makes the loss itself finite
            limit = MAX_SKIPPED_SCALED if seeking else MAX_SKIPPED
            if self.skipped_in_a_row >= (min(limit, step) if last else limit):
                return f"loss or gradients were not finite in {self.skipped_in_a_row} steps in a row"
            return None
        self.skipped_in_a_row = 0
        self.recent.append(loss)
        running = self.running
        if running is None:
            return None
        self.first = running if self.first is None else self.first
        if running < self.lowest:
            self.lowest, self.lowest_step = running, step
        if running > self.lowest + CLIMB and running > self.first + ABOVE_START:
            to = f"{self.lowest:.2f} (mean of {WINDOW} steps to {self.lowest_step}) to {running:.2f}"
            return f"the loss climbed from {to}"
        return None


def likely_cause(watch: LossWatch, learning_rate: float, precision: str, step: int) -> str:
    """The probable cause of the divergence, and what to try."""
    if watch.skipped_in_a_row >= step:
        return (
            "No step was finite, so the base model's weights are probably damaged, or too large for "
            f"{precision}. Try precision=fp32, or download the model again"
        )
    lower = f"training.learning_rate={learning_rate / 4:g}"
    if precision == "fp16":
        return f"The learning rate is probably too high, or values overflow fp16. Start a new run with {lower}"
    return f"The learning rate is probably too high. Start a new run with {lower}, or with trainer.warmup_steps=50"
