"""Watches the losses of a run: steps whose numbers are not finite, and a loss that climbs away.

A step whose loss or gradients are infinite or no number is left out: the weights and the optimizer's moments stay as
they were. Where that happens again and again, or the loss climbs, going on would only cost time.
"""

import math
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

from huarizo.errors import UserError

WINDOW = 20  # steps of the running mean
MAX_SKIPPED = 5  # steps in a row
MAX_SKIPPED_SCALED = 30  # the same with loss scaling, which begins by finding its scale
CLIMB = 2.0  # nats above the lowest running mean, and
ABOVE_START = 0.5  # nats above the first one


class DivergedError(UserError):
    """The numbers of a run went wrong; the message says how to go on."""


@dataclass
class LossWatch:
    """Fed with each step's loss; its state is part of a checkpoint."""

    recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    skipped: int = 0
    skipped_in_a_row: int = 0
    first: float | None = None
    lowest: float = math.inf
    lowest_step: int = 0

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "LossWatch":
        lowest = math.inf if state["lowest"] is None else state["lowest"]
        return cls(**(state | {"recent": deque(state["recent"], WINDOW), "lowest": lowest}))

    def state(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        lowest = self.lowest if math.isfinite(self.lowest) else None
        return asdict(self) | {"recent": list(self.recent), "lowest": lowest}

    @property
    def running(self) -> float | None:
        """Mean of the last WINDOW finite losses, in nats a token; None before there are so many."""
        return sum(self.recent) / WINDOW if len(self.recent) == WINDOW else None

    def add(self, step: int, loss: float, skipped: bool, scaled: bool = False, last: bool = False) -> str | None:
        """Note a step; returns what is wrong with the run, in words, or None.

        skipped: the weights were not changed, because loss or gradients were not finite.
        scaled: with loss scaling, where steps may be skipped without harm while the scale is sought.
        last: of the run; it may not end in skipped steps as if it had learnt in them.
        """
        if skipped:
            self.skipped += 1
            self.skipped_in_a_row += 1
            seeking = scaled and math.isfinite(loss) and not last  # no scale mends the loss itself
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
    """What probably made the numbers go wrong, and what to try."""
    if watch.skipped_in_a_row >= step:
        return (
            "It never went right, so the base model's weights are probably damaged, or too large for "
            f"{precision}. Try precision=fp32, or fetch the model again"
        )
    lower = f"training.learning_rate={learning_rate / 4:g}"
    if precision == "fp16":
        return f"Likely too large a learning rate, or numbers too large for fp16. Start a new run with {lower}"
    return f"Likely too large a learning rate. Start a new run with {lower}, or with warm-up: trainer.warmup_steps=50"
