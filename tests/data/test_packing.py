"""Packing: no token is lost or doubled, positions restart, targets are the next tokens inside an example."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from huarizo.data.packing import PackedBatch, StepCollator, StepSampler, cut, num_labels, pack
from huarizo.data.tokens import IGNORED, Example

EXAMPLE = st.integers(1, 40).flatmap(
    lambda n: st.tuples(st.lists(st.integers(0, 99), min_size=n, max_size=n), st.lists(st.booleans(), min_size=n, max_size=n))
).map(lambda pair: Example(pair[0], [i if m else IGNORED for i, m in zip(*pair, strict=True)]))  # fmt: skip


def tensors_of(batch: PackedBatch) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}


@settings(max_examples=200, deadline=None)
@given(st.lists(EXAMPLE, min_size=1, max_size=8))
def test_a_pack_holds_its_examples_exactly(examples: list[Example]) -> None:
    batch = pack(examples)
    bounds = batch.cu_seqlens.tolist()
    seen = [batch.input_ids[0, a:b].tolist() for a, b in itertools.pairwise(bounds)]
    assert seen == [example.input_ids for example in examples]
    assert batch.position_ids[0].tolist() == [i for example in examples for i in range(len(example.input_ids))]
    expected = []
    for start, example in zip(bounds, examples, strict=False):
        labels = example.labels
        expected += [(start + i - 1, labels[i]) for i in range(1, len(labels)) if labels[i] != IGNORED]
    assert list(zip(batch.label_positions.tolist(), batch.targets.tolist(), strict=True)) == expected
    assert len(expected) == num_labels(examples) == batch.num_labels
    assert (batch.num_examples, batch.num_tokens) == (len(examples), bounds[-1])
    assert batch.longest == max(len(example.input_ids) for example in examples)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 120))
def test_cutting_keeps_order_and_budget(lengths: list[int], budget: int) -> None:
    parts = cut(lengths, budget)
    assert [i for part in parts for i in part] == list(range(len(lengths)))
    for part in parts:
        assert len(part) == 1 or sum(lengths[i] for i in part) <= budget
    for a, b in itertools.pairwise(parts):
        assert sum(lengths[i] for i in a) + lengths[b[0]] > budget  # as few as can be in this order


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 3))
def test_every_row_is_in_one_step_of_each_epoch(rows: int, batch_size: int, epoch: int) -> None:
    sampler = StepSampler(rows, batch_size, seed=3)
    sampler.set_epoch(epoch)
    steps = list(sampler)
    assert len(steps) == len(sampler) and all(len(step) == batch_size for step in steps[:-1])
    assert sorted(i for step in steps for i in step) == list(range(rows))


def test_packing_takes_tensors_and_lists_alike() -> None:
    rows = [{"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    tensors = [{name: torch.tensor(values) for name, values in row.items()} for row in rows]
    (as_list,), (as_tensor,) = (StepCollator()(each).micro_batches(99) for each in (rows, tensors))
    assert tensors_of(as_list).keys() == tensors_of(as_tensor).keys()
    assert all(torch.equal(tensor, tensors_of(as_tensor)[name]) for name, tensor in tensors_of(as_list).items())


def test_a_batch_moves_without_its_boundaries() -> None:
    batch = pack([Example([1, 2, 3], [IGNORED, 2, 3])])
    moved = batch.to(torch.device("meta"))
    assert moved.longest == batch.longest
    assert all(tensor.is_meta for tensor in tensors_of(moved).values())
    assert moved.model_inputs().keys() == {"input_ids", "position_ids", "cu_seqlens", "longest"}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_step_knows_the_longest_example_of_its_process(world_size: int) -> None:
    rows = [{"input_ids": [1] * length, "labels": [1] * length} for length in (3, 9, 5)]
    steps = [StepCollator(rank, world_size)(rows) for rank in range(world_size)]
    assert [step.longest for step in steps] == {1: [9], 2: [5, 9], 4: [3, 9, 5, 3]}[world_size]
    for step in steps:
        assert max(batch.longest for batch in step.micro_batches(8)) == step.longest
