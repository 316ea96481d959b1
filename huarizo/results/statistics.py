"""Losses of rows before and after training, with confidence intervals.

The mean over tokens is a ratio of two sums over rows. Its interval therefore comes from the spread of the rows, not of
the tokens, and a change is computed row by row.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mpmath
import torch
from rich.console import Console

from huarizo.console import tracked
from huarizo.data.padding import Batch
from huarizo.data.tokens import Example
from huarizo.errors import MachineError
from huarizo.inference.generate import Assistant
from huarizo.machine import is_out_of_memory
from huarizo.model.batching import CHECKED_ROWS, BatchLoss, check_batching, losses_of, planned_batching
from huarizo.model.compile import uncompiled

# Shapes: n examples of a batch, L labelled tokens in it.

LARGEST = 700  # nats; exp of more overflows a float
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Mean:
    """A mean loss a token, in nats, with its 95 % confidence interval. `low` and `high` are NaN for one row."""

    value: float
    low: float
    high: float

    @property
    def perplexity(self) -> "Mean":
        """e to the loss, with its interval."""
        return Mean(*(math.exp(x) if not x > LARGEST else math.inf for x in (self.value, self.low, self.high)))

    def __str__(self) -> str:
        half = (self.high - self.low) / 2
        return f"{self.value:.4f}" + ("" if math.isnan(half) else f" ± {half:.4f}")


@functools.cache
def student_t975(freedom: int) -> float:
    """The 97.5 % quantile of Student's t by degrees of freedom.

    The t at which both tails together, I_x(freedom / 2, 1 / 2) with x = freedom / (freedom + t^2), hold 5 %: Abramowitz
    and Stegun, Handbook of Mathematical Functions (1964), 26.7.1 with 26.5.27. It lies between the normal
    distribution's quantile, 1.96, and that of one degree of freedom, 12.71.
    """

    def excess(t: float) -> Any:
        return mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True) - 0.05

    return float(mpmath.findroot(excess, (1.95, 12.75), solver="illinois"))


def mean_loss(sums: Sequence[float], tokens: Sequence[int]) -> Mean:
    """The mean over all tokens of rows, from the rows' summed losses and numbers of tokens.

    The interval is that of a ratio estimator over clusters, by linearisation (Cochran, Sampling Techniques, 3rd
    edition, 1977, section 6.3): variance = n / (n - 1) * sum_i (s_i - r t_i)^2 / (sum_i t_i)^2, with Student's t on
    n - 1 degrees of freedom. Below about 20 rows it is too narrow if the rows differ much.

    For the difference of two means over the same rows, pass the differences of the sums.
    """
    total, rows = sum(tokens), len(sums)
    mean = math.fsum(sums) / total
    if rows < 2:
        return Mean(mean, math.nan, math.nan)
    spread = math.fsum((s - mean * t) ** 2 for s, t in zip(sums, tokens, strict=True))
    half = student_t975(rows - 1) * math.sqrt(rows / (rows - 1) * spread) / total
    return Mean(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Losses:
    """Summed losses of rows before and after training, in nats, and their numbers of labelled tokens."""

    before: list[float]
    after: list[float]
    tokens: list[int]

    @property
    def mean_before(self) -> Mean:
        return mean_loss(self.before, self.tokens)

    @property
    def mean_after(self) -> Mean:
        return mean_loss(self.after, self.tokens)

    @property
    def change(self) -> Mean:
        """After minus before, row by row. Its interval is narrower than either mean's if rows change alike."""
        return mean_loss([after - before for before, after in zip(self.before, self.after, strict=True)], self.tokens)

    def together(self, counts: Sequence[int]) -> "Losses":
        """The same by row, where row i consists of the next `counts[i]` examples."""
        ends = list(itertools.accumulate(counts))
        spans = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
        before, after = ([math.fsum(each[span]) for span in spans] for each in (self.before, self.after))
        return Losses(before, after, [sum(self.tokens[span]) for span in spans])


def measure(assistant: Assistant, examples: Sequence[Example], console: Console | None = None) -> Losses:
    """Losses of tokenised examples, without and with the adapter.

    console: a terminal to show progress on.

    Raises:
        MachineError: the longest example does not fit into memory.
    """
    base = assistant.model.get_base_model()
    checked = check_batching(assistant.model, planned_batching(base.config)[0], examples[:CHECKED_ROWS])
    losses = losses_of(base, checked.batching)

    def measured() -> list[tuple[float, int]]:
        found = dict(tracked(_row_losses(losses, assistant.model, examples), "reading", console, len(examples)))
        return [found[index] for index in range(len(examples))]

    with assistant.untuned():
        before = measured()
    after = measured()
    return Losses([loss for loss, _ in before], [loss for loss, _ in after], [count for _, count in after])


def _row_losses(losses: BatchLoss, model: Any, examples: Sequence[Example]) -> Iterator[tuple[int, tuple[float, int]]]:
    """Each example's index with its (summed loss, labelled tokens). Halves the batch when memory runs out."""
    model.eval()
    left, budget = list(range(len(examples))), BATCH_TOKENS
    while left:
        batch = next(losses.within(budget, [examples[index] for index in left[:256]], None))
        try:
            found = _batch_losses(losses, model, batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if batch.num_examples == 1:
                raise MachineError("not enough memory for the longest row. Use a smaller data.max_length") from None
            budget //= 2
            torch.cuda.empty_cache()
            continue
        yield from zip((left[place] for place in batch.indices), found, strict=True)
        left = [index for place, index in enumerate(left) if place not in batch.indices]


def _batch_losses(losses: BatchLoss, model: Any, batch: Batch) -> list[tuple[float, int]]:
    with uncompiled():
        losses_L = losses.by_token(model, batch.to(model.device))
    rows_L = batch.label_rows
    sums_n = torch.zeros(batch.num_examples, dtype=torch.float64).index_add(0, rows_L, losses_L.double().cpu())
    return list(zip(sums_n.tolist(), rows_L.bincount(minlength=batch.num_examples).tolist(), strict=True))
