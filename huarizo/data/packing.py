"""Examples of one optimizer step become packed micro-batches: laid end to end, without padding.

    rows of the step   [a a a] [b b] [c c c c]          micro_batch_tokens = 5, one process
    micro-batch 1      input_ids     a a a b b          cu_seqlens 0 3 5      position_ids 0 1 2 0 1
    micro-batch 2      input_ids     c c c c            cu_seqlens 0 4        position_ids 0 1 2 3

Which examples make a step, and in which order, depends on the number of rows, the batch size, the seed and the epoch
alone. How a step is cut into micro-batches and dealt out to processes depends on the machine, and changes no result:
`num_labels` counts the labelled tokens of the whole step, over all micro-batches and processes.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader, Sampler

from huarizo.data.tokens import IGNORED, Example, TokenisedRow
from huarizo.machine import moved

if TYPE_CHECKING:
    from huarizo.data.padding import Batch, Within

# Shapes: T tokens of a packed row, n examples in it, L labels.


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


def tensors_on(device: torch.device, batch: object) -> dict[str, torch.Tensor]:
    """The tensors among the fields of a batch, by name, on a device."""
    return {name: moved(value, device) for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}


@dataclass(frozen=True)
class PackedBatch:
    """Examples laid end to end, as one row without padding."""

    input_ids: torch.Tensor
    """int64 [1, T]"""
    position_ids: torch.Tensor
    """int64 [1, T], from 0 in each example"""
    cu_seqlens: torch.Tensor
    """int32 [n + 1], where each example begins, and the end"""
    places: torch.Tensor
    """int64 [T], of each token in the optimizer step"""
    label_positions: torch.Tensor
    """int64 [L], the tokens whose next token is learnt"""
    targets: torch.Tensor
    """int64 [L], those next tokens"""
    longest: int
    """tokens of the longest example"""
    indices: tuple[int, ...]
    """the examples, by their number among those that the batch was made from"""

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]

    @property
    def num_examples(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def num_labels(self) -> int:
        return len(self.targets)

    @property
    def lengths(self) -> torch.Tensor:
        """int64 [T], tokens of each token's example."""
        lengths_n = self.cu_seqlens.diff().long()
        return lengths_n.repeat_interleave(lengths_n, output_size=self.num_tokens)

    @property
    def label_rows(self) -> torch.Tensor:
        """int64 [L], the example that each label is in, by its place in the batch."""
        return torch.bucketize(self.label_positions, self.cu_seqlens[1:].long(), right=True)

    def model_inputs(self) -> dict[str, torch.Tensor | int]:
        """What the model's forward pass takes, by its own names, and what its attention needs."""
        boundaries = {"cu_seqlens": self.cu_seqlens, "longest": self.longest}
        return {"input_ids": self.input_ids, "position_ids": self.position_ids, **boundaries}

    def to(self, device: torch.device) -> "PackedBatch":
        """The same on a device."""
        return dataclasses.replace(self, **tensors_on(device, self))


def pack(
    examples: Sequence[Example], places: Sequence[int] | None = None, indices: Sequence[int] | None = None
) -> PackedBatch:
    """Lay examples end to end.

    places: where each example begins in the optimizer step; by default these are the whole of it.
    indices: the number of each example, as `PackedBatch.indices`; by default from 0.
    """
    lengths = lengths_of(examples)
    lengths_n = torch.tensor(lengths)
    input_ids_T = torch.cat([torch.as_tensor(example.input_ids) for example in examples]).long()
    labels_T = torch.cat([torch.as_tensor(example.labels) for example in examples]).long()
    ends_n = lengths_n.cumsum(0)
    labels_T[ends_n - lengths_n] = IGNORED  # nothing predicts the first token of an example
    label_positions_L, targets_L = next_tokens(labels_T)
    position_ids_T = torch.cat([torch.arange(length) for length in lengths])
    begins_n = torch.tensor(starts(lengths) if places is None else places)
    return PackedBatch(
        input_ids=input_ids_T[None],
        position_ids=position_ids_T[None],
        cu_seqlens=torch.nn.functional.pad(ends_n, (1, 0)).int(),
        places=begins_n.repeat_interleave(lengths_n) + position_ids_T,
        label_positions=label_positions_L,
        targets=targets_L,
        longest=max(lengths),
        indices=tuple(range(len(examples)) if indices is None else indices),
    )


def next_tokens(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens whose next token is learnt, and those next tokens: int64 [L] each.

    labels: int64 [T], of examples one after another, IGNORED at the first token of each.
    """
    label_positions_L = (labels[1:] != IGNORED).nonzero()[:, 0]
    return label_positions_L, labels[label_positions_L + 1]


def lengths_of(examples: Sequence[Example]) -> list[int]:
    """Tokens of each example."""
    return [len(example.input_ids) for example in examples]


def num_labels(examples: Sequence[Example]) -> int:
    """Tokens that are learnt from: labels other than -100, without each example's first, which nothing predicts."""
    return sum(int((torch.as_tensor(example.labels)[1:] != IGNORED).sum()) for example in examples)


def cut(lengths: Sequence[int], budget: int) -> list[range]:
    """Ranges of consecutive examples of at most `budget` tokens; a longer example stands alone."""
    ranges, start, total = [], 0, 0
    for index, length in enumerate(lengths):
        if index > start and total + length > budget:
            ranges.append(range(start, index))
            start, total = index, 0
        total += length
    return [*ranges, range(start, len(lengths))] if lengths else []


def pack_within(budget: int, examples: Sequence[Example], places: Sequence[int] | None = None) -> Iterator[PackedBatch]:
    """Packed batches of at most `budget` tokens each, in the order of the examples; a longer example stands alone.

    places: as `pack` takes them; by default the examples are the whole of an optimizer step.
    """
    lengths = lengths_of(examples)
    begins = starts(lengths) if places is None else places
    for part in cut(lengths, budget):
        yield pack([examples[index] for index in part], [begins[index] for index in part], part)


@dataclass(frozen=True)
class Step:
    """What one process computes of an optimizer step."""

    examples: list[Example]
    """this process's share of the step"""
    places: list[int]
    """where each of them begins in the whole step"""
    num_labels: int
    """labelled tokens of the whole step, over all processes"""
    num_tokens: int
    """tokens of the whole step"""

    @property
    def longest(self) -> int:
        """Tokens of this process's longest example."""
        return max(lengths_of(self.examples))

    def micro_batches(self, budget: int, within: "Within" = pack_within) -> "list[Batch]":
        """Batches of at most `budget` tokens each, as `within` makes them."""
        return list(within(budget, self.examples, self.places))


@dataclass(frozen=True)
class StepCollator:
    """Makes the `Step` of process `rank` of `world_size` from its rows. They are dealt out in turn.

    A process without an example of its own computes the step's first one without labels, so that every process takes
    part in the exchange of gradients.
    """

    rank: int = 0
    world_size: int = 1

    def __call__(self, rows: Sequence[TokenisedRow]) -> Step:
        examples = [Example.from_row(row) for row in rows]
        lengths = lengths_of(examples)
        share = slice(self.rank, None, self.world_size)
        mine, places = examples[share], starts(lengths)[share]
        if not mine:
            mine, places = [Example(examples[0].input_ids, [IGNORED] * lengths[0])], [0]
        return Step(mine, places, num_labels(examples), sum(lengths))
