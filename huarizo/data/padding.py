"""Examples of one optimizer step become padded micro-batches: rows of similar length, padded on the right.

    rows of the step   [a a a] [b b b b b] [c c c c c c]          micro_batch_tokens = 12, one process
    micro-batch 1      input_ids   c c c c c c      attention_mask   1 1 1 1 1 1
                                   b b b b b .                       1 1 1 1 1 0
    micro-batch 2      input_ids   a a a            attention_mask   1 1 1

This is for models of which it isn't known that they keep packed examples apart (`huarizo.data.packing`). A causal model
never sees the padding on the right, so the loss of real tokens is that of each example alone. Rows of a group have
similar lengths, and instruction data gets about 2 % more tokens.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from huarizo.data.packing import PackedBatch, lengths_of, next_tokens, starts, tensors_on
from huarizo.data.tokens import IGNORED, Example

SLACK = 0.2  # the most padding of a row, as a share of its tokens

# Shapes: n examples of a group, W tokens of the longest of them, L labels.


@dataclass(frozen=True)
class PaddedBatch:
    """Examples below each other, each a row of W tokens, with the interface of a `PackedBatch`.

    Tokens are numbered row by row: token w of row i is i W + w.
    """

    input_ids: torch.Tensor
    """int64 [n, W], 0 where there is padding"""
    attention_mask: torch.Tensor
    """int64 [n, W], 1 for a token and 0 for padding"""
    lengths: torch.Tensor
    """int64 [n W], tokens of the example in each token's row"""
    places: torch.Tensor
    """int64 [n W], of each token in the optimizer step; padding goes on behind its example"""
    label_positions: torch.Tensor
    """int64 [L], the tokens whose next token is learnt"""
    targets: torch.Tensor
    """int64 [L], those next tokens"""
    indices: tuple[int, ...]
    """the rows' examples, by their number among those that the batch was made from"""

    @property
    def num_examples(self) -> int:
        return self.input_ids.shape[0]

    @property
    def longest(self) -> int:
        return self.input_ids.shape[1]

    @property
    def num_labels(self) -> int:
        return len(self.targets)

    @property
    def label_rows(self) -> torch.Tensor:
        """int64 [L], the row that each label is in."""
        return self.label_positions // self.longest

    @property
    def label_columns(self) -> torch.Tensor:
        """int64 [L], the place of each label's token within its row."""
        return self.label_positions % self.longest

    def model_inputs(self) -> dict[str, torch.Tensor]:
        """What the model's forward pass takes, by its own names."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    def to(self, device: torch.device) -> "PaddedBatch":
        """The same on a device."""
        return dataclasses.replace(self, **tensors_on(device, self))


def pad(
    examples: Sequence[Example], places: Sequence[int] | None = None, indices: Sequence[int] | None = None
) -> PaddedBatch:
    """Pad examples to the longest.

    places: where each example begins in the optimizer step; by default these are the whole of it.
    indices: the number of each example, as `PaddedBatch.indices`; by default from 0.
    """
    lengths = lengths_of(examples)
    lengths_n1 = torch.tensor(lengths)[:, None]
    columns_W = torch.arange(max(lengths))
    input_ids_nW = pad_sequence([torch.as_tensor(example.input_ids).long() for example in examples], batch_first=True)
    labels_nW = pad_sequence(
        [torch.as_tensor(example.labels).long() for example in examples], batch_first=True, padding_value=IGNORED
    )
    labels_nW[:, 0] = IGNORED  # nothing predicts the first token of an example
    label_positions_L, targets_L = next_tokens(labels_nW.flatten())
    begins_n1 = torch.tensor(starts(lengths) if places is None else places)[:, None]
    return PaddedBatch(
        input_ids=input_ids_nW,
        attention_mask=(columns_W < lengths_n1).long(),
        lengths=lengths_n1.expand_as(input_ids_nW).flatten(),
        places=(begins_n1 + columns_W).flatten(),
        label_positions=label_positions_L,
        targets=targets_L,
        indices=tuple(range(len(examples)) if indices is None else indices),
    )


def groups(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """The indices of examples in groups of similar length, the longest first.

    A group has at most `budget` tokens with its padding, and the padding of a row is at most SLACK of its tokens. A
    longer example stands alone.
    """
    found: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        group = found[-1] if found else []
        longest = lengths[group[0]] if group else 0
        if group and longest <= (1 + SLACK) * lengths[index] and (len(group) + 1) * longest <= budget:
            group.append(index)
        else:
            found.append([index])
    return found


def pad_within(budget: int, examples: Sequence[Example], places: Sequence[int] | None = None) -> Iterator[PaddedBatch]:
    """Padded batches of the `groups` of at most `budget` tokens.

    places: as `pad` takes them; by default the examples are the whole of an optimizer step.
    """
    lengths = lengths_of(examples)
    begins = starts(lengths) if places is None else places
    for group in groups(lengths, budget):
        yield pad([examples[index] for index in group], [begins[index] for index in group], group)


def each_alone(budget: int, examples: Sequence[Example], places: Sequence[int] | None = None) -> Iterator[PaddedBatch]:
    """Each example as a batch of its own, the longest first, whatever the budget. Arguments as `pad_within`."""
    return pad_within(0, examples, places)


Batch = PackedBatch | PaddedBatch
Within = Callable[[int, Sequence[Example], Sequence[int] | None], Iterator[Batch]]
"""How examples are cut into batches: `pack_within`, `pad_within` or `each_alone`."""
