"""Padding: no token is lost or doubled, targets are the next tokens of the same row, and little is wasted."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from huarizo.data.packing import StepCollator, num_labels, pack
from huarizo.data.padding import SLACK, Within, each_alone, groups, pad, pad_within
from huarizo.data.tokens import IGNORED, Example
from tests.data.test_packing import EXAMPLE

LENGTHS = st.lists(st.integers(1, 60), max_size=30)


@settings(max_examples=200, deadline=None)
@given(st.lists(EXAMPLE, min_size=1, max_size=8))
def test_a_padded_batch_holds_its_examples_exactly(examples: list[Example]) -> None:
    batch = pad(examples)
    lengths = [len(example.input_ids) for example in examples]
    assert batch.attention_mask.sum(1).tolist() == lengths
    seen = [row[mask.bool()].tolist() for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    assert seen == [example.input_ids for example in examples]
    assert (batch.num_examples, batch.longest) == (len(examples), max(lengths))
    assert not batch.input_ids[batch.attention_mask == 0].any()
    labels = [
        (row, place - 1, example.labels[place])
        for row, example in enumerate(examples)
        for place in range(1, lengths[row])
        if example.labels[place] != IGNORED
    ]
    found = zip(batch.label_rows.tolist(), batch.label_columns.tolist(), batch.targets.tolist(), strict=True)
    assert list(found) == labels and len(labels) == num_labels(examples) == batch.num_labels


@settings(max_examples=100, deadline=None)
@given(st.lists(EXAMPLE, min_size=1, max_size=8))
def test_tokens_have_the_places_and_lengths_of_a_pack(examples: list[Example]) -> None:
    padded, packed = pad(examples), pack(examples)
    real = padded.attention_mask.flatten().bool()
    assert torch.equal(padded.places[real], packed.places) and torch.equal(padded.lengths[real], packed.lengths)
    assert torch.equal(padded.targets, packed.targets) and torch.equal(padded.label_rows, packed.label_rows)
    assert torch.equal(padded.places[padded.label_positions], packed.places[packed.label_positions])


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(0, 200))
def test_groups_have_every_example_once_and_waste_little(lengths: list[int], budget: int) -> None:
    found = groups(lengths, budget)
    assert sorted(index for group in found for index in group) == list(range(len(lengths)))
    for group in found:
        width = max(lengths[index] for index in group)
        assert len(group) == 1 or len(group) * width <= budget
        assert width <= (1 + SLACK) * min(lengths[index] for index in group)
    assert found == groups(lengths, budget), "the same rows always make the same groups"


def test_alike_rows_share_a_batch_and_the_longest_comes_first() -> None:
    assert groups([10, 30, 12, 29, 11], 1000) == [[1, 3], [2, 4, 0]]
    assert groups([10, 30, 12, 29, 11], 24) == [[1], [3], [2, 4], [0]]


def test_a_step_is_cut_into_padded_batches() -> None:
    rows: Any = [{"input_ids": [1] * length, "labels": [1] * length} for length in (3, 9, 5, 8)]
    step = StepCollator()(rows)
    batches = list(pad_within(18, step.examples, step.places))
    assert [batch.indices for batch in batches] == [(1, 3), (2,), (0,)]
    assert step.micro_batches(18, pad_within)[0].places.tolist() == [*range(3, 12), *range(17, 26)]
    assert sum(batch.num_labels for batch in batches) == step.num_labels
    assert [batch.indices for batch in each_alone(4096, step.examples)] == [(1,), (3,), (2,), (0,)]


def test_lists_and_tensors_are_padded_alike_and_move_whole() -> None:
    examples = [Example([1, 2, 3], [IGNORED, 2, 3]), Example([4], [4])]
    tensors = [Example(torch.tensor(e.input_ids), torch.tensor(e.labels)) for e in examples]  # pyright: ignore
    for name, tensor in vars(pad(examples)).items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(tensor, vars(pad(tensors))[name]), name
    moved = pad(examples).to(torch.device("meta"))
    assert all(value.is_meta for value in vars(moved).values() if isinstance(value, torch.Tensor))
    assert moved.model_inputs().keys() == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("within", [pad_within, each_alone])
def test_places_are_those_of_the_whole_step(within: Within) -> None:
    examples = [Example([1] * length, [1] * length) for length in (4, 6, 5)]
    batches: list[Any] = list(within(4096, examples, None))
    seen = [place for each in batches for place in each.places[each.attention_mask.flatten().bool()].tolist()]
    assert sorted(seen) == pack(examples).places.tolist()
