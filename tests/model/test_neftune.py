"""Noise on the embeddings is each example's own, and does not depend on what it is packed with."""

import math
from pathlib import Path

import pytest
import torch

from huarizo.data.packing import PackedBatch, pack
from huarizo.data.tokens import Example
from huarizo.model.neftune import EmbeddingNoise
from huarizo.recipe import make_recipe
from tests.tiny import make_model
from tests.training.make import lora_model, make_trainer, packed_loss_and_gradients, random_examples

ALPHA, WIDTH = 5.0, 64


def noise_of(batch: PackedBatch, step: int = 3, seed: int = 1) -> torch.Tensor:
    """What the embeddings of a batch get: [T, K]."""
    model = make_model().train()
    plain = model.get_input_embeddings()(batch.input_ids)
    EmbeddingNoise(model, ALPHA, seed).draw(step, batch.places, batch.lengths)
    return (model.get_input_embeddings()(batch.input_ids) - plain)[0].detach()


def test_it_is_scaled_by_the_length_of_each_example() -> None:
    examples = [Example([4] * length, [4] * length) for length in (4, 400)]
    noise = noise_of(pack(examples))
    for rows, length in ((noise[:4], 4), (noise[4:], 400)):
        most = ALPHA / math.sqrt(length * WIDTH)
        assert 0.9 * most < float(rows.abs().max()) <= 1.001 * most
        assert float(rows.std()) == pytest.approx(most / math.sqrt(3), rel=0.1)
        assert abs(float(rows.mean())) < 0.15 * most


def test_it_is_the_same_in_any_micro_batch_and_another_in_another_step() -> None:
    examples = [Example([4] * length, [4] * length) for length in (5, 7, 3)]
    whole = noise_of(pack(examples))
    assert torch.equal(noise_of(pack(examples[1:], [5, 12])), whole[5:])
    assert torch.equal(noise_of(pack(examples)), whole)
    assert not torch.allclose(noise_of(pack(examples), step=4), whole)
    assert not torch.allclose(noise_of(pack(examples), seed=2), whole)


def test_evaluation_has_none() -> None:
    model, batch = make_model().eval(), pack([Example([4, 5], [4, 5])])
    plain = model.get_input_embeddings()(batch.input_ids)
    EmbeddingNoise(model, ALPHA, 1).draw(0, batch.places, batch.lengths)
    assert torch.equal(model.get_input_embeddings()(batch.input_ids), plain)


def test_a_step_is_the_same_however_it_is_cut(tmp_path: Path) -> None:
    recipe = make_recipe(lora={"dropout": 0.3}, trainer={"neftune_noise_alpha": 5})
    examples, results = random_examples([9, 30, 17, 25]), []
    for budget in (4096, 40, 10):
        trainer = make_trainer(lora_model(recipe), recipe, examples, tmp_path, budget=budget)
        results.append(packed_loss_and_gradients(trainer, examples))
    without = make_recipe(lora={"dropout": 0.3})
    trainer = make_trainer(lora_model(without), without, examples, tmp_path)
    assert packed_loss_and_gradients(trainer, examples)[0] != pytest.approx(results[0][0], rel=1e-4)
    for loss, gradients in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        assert all(torch.allclose(gradients[name], grad, atol=1e-6) for name, grad in results[0][1].items())
