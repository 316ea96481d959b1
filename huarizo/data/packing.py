"""Examples of one optimizer step become packed micro-batches: laid end to end, without padding.

    rows of the step   [a a a] [b b] [c c c c]          micro_batch_tokens = 5, one process
    micro-batch 1      input_ids     a a a b b          cu_seqlens 0 3 5      position_ids 0 1 2 0 1
    micro-batch 2      input_ids     c c c c            cu_seqlens 0 4        position_ids 0 1 2 3

Which examples make a step, and in which order, depends on the number of rows, the batch size, the seed and the epoch
alone. How a step is cut into micro-batches and dealt out to processes depends on the machine, and changes no result:
`num_labels` counts the labelled tokens of the whole step, over all micro-batches and processes.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from huarizo.data.tokens import IGNORED


def order(num_rows: int, seed: int, epoch: int) -> list[int]:
    """The order of the rows in an epoch; the one that Transformers' Trainer draws (Accelerate's seedable sampler)."""
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed + epoch)).tolist()


class StepSampler(Sampler[list[int]]):
    """For each optimizer step of the epoch, the indices of its examples."""

    def __init__(self, num_rows: int, batch_size: int, seed: int) -> None:
        self.num_rows, self.batch_size, self.seed, self.epoch = num_rows, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.num_rows // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        rows = order(self.num_rows, self.seed, self.epoch)
        yield from (rows[i : i + self.batch_size] for i in range(0, self.num_rows, self.batch_size))


class StepLoader(DataLoader):
    """A DataLoader that passes the epoch on to its StepSampler."""

    def set_epoch(self, epoch: int) -> None:
        if isinstance(self.batch_sampler, StepSampler):
            self.batch_sampler.set_epoch(epoch)


def starts(lengths: Sequence[int]) -> list[int]:
    """Where examples of these lengths begin that are laid end to end."""
    return [0, *itertools.accumulate(lengths)][: len(lengths)]


def pack(examples: Sequence[dict[str, Any]], places: Sequence[int] | None = None) -> dict[str, torch.Tensor]:
    """Lay examples (`input_ids`, `labels`) end to end. T tokens, n examples, L labels:

    places: where each example begins in the optimizer step; by default these are the whole of it.

    input_ids, position_ids: [1, T] int64; cu_seqlens: [n + 1] int32, where each example begins, and the end;
    places: [T] int64, of each token in the optimizer step;
    label_positions: [L] int64, the tokens whose next token is learnt; targets: [L] int64, those next tokens.
    """
    lengths = [len(example["input_ids"]) for example in examples]
    input_ids = torch.cat([torch.as_tensor(example["input_ids"]) for example in examples]).long()
    labels = torch.cat([torch.as_tensor(example["labels"]) for example in examples]).long()
    ends = torch.tensor(lengths).cumsum(0)
    labels[ends - torch.tensor(lengths)] = IGNORED  # nothing predicts the first token of an example
    label_positions = (labels[1:] != IGNORED).nonzero()[:, 0]
    position_ids = torch.cat([torch.arange(length) for length in lengths])
    begins = torch.tensor(starts(lengths) if places is None else places)
    return {
        "input_ids": input_ids[None],
        "position_ids": position_ids[None],
        "places": begins.repeat_interleave(torch.tensor(lengths)) + position_ids,
        "cu_seqlens": torch.nn.functional.pad(ends, (1, 0)).int(),
        "label_positions": label_positions,
        "targets": labels[label_positions + 1],
    }


def num_labels(examples: Sequence[dict[str, Any]]) -> int:
    """Tokens that are learnt from: labels other than -100, without each example's first, which nothing predicts."""
    return sum(int((torch.as_tensor(example["labels"])[1:] != IGNORED).sum()) for example in examples)


def cut(lengths: Sequence[int], budget: int) -> list[range]:
    """Ranges of consecutive examples of at most `budget` tokens; a longer example stands alone."""
    ranges, start, total = [], 0, 0
    for index, length in enumerate(lengths):
        if index > start and total + length > budget:
            ranges.append(range(start, index))
            start, total = index, 0
        total += length
    return [*ranges, range(start, len(lengths))] if lengths else []


@dataclass(frozen=True)
class Step:
    """What one process computes of an optimizer step.

    examples: this process's share of the step; places: where each of them begins in the whole step;
    num_labels: labelled tokens of the whole step, over all processes; num_tokens: tokens of the whole step.
    """

    examples: list[dict[str, Any]]
    places: list[int]
    num_labels: int
    num_tokens: int

    def micro_batches(self, budget: int) -> list[dict[str, torch.Tensor]]:
        """Packed batches of at most `budget` tokens each."""
        ranges = cut([len(example["input_ids"]) for example in self.examples], budget)
        return [pack([self.examples[i] for i in part], [self.places[i] for i in part]) for part in ranges]


@dataclass(frozen=True)
class StepCollator:
    """Makes the `Step` of process `rank` of `world_size`. Examples are dealt out in turn.

    A process without an example of its own computes the step's first one without labels, so that every process takes
    part in the exchange of gradients.
    """

    rank: int = 0
    world_size: int = 1

    def __call__(self, examples: list[dict[str, Any]]) -> Step:
        lengths = [len(example["input_ids"]) for example in examples]
        mine, places = (every[self.rank :: self.world_size] for every in (examples, starts(lengths)))
        if not mine:
            labels = [IGNORED] * len(examples[0]["labels"])
            mine, places = [{"input_ids": examples[0]["input_ids"], "labels": labels}], [0]
        return Step(mine, places, num_labels(examples), sum(lengths))
