"""The loss of padded batches is that of the packed ones and of stock Transformers, with the same dropout."""

from typing import Any, get_args

import pytest
import torch
from transformers import LlamaForCausalLM

from huarizo.data.packing import pack
from huarizo.data.padding import pad
from huarizo.data.tokens import IGNORED, Example
from huarizo.model.attention import NAME as PACKED
from huarizo.model.batching import losses_of
from huarizo.model.dropout import DropoutMasks
from huarizo.model.loss import PackedLoss
from huarizo.model.padded_loss import PaddedLoss, take_own_attention
from huarizo.plan import Batching
from huarizo.recipe import make_recipe
from tests.stock import padded_loss_and_gradients
from tests.training.make import lora_model, random_examples, relative

ROWS = random_examples([2, 63, 64, 65, 129, 7])
EXAMPLES = [Example(row["input_ids"], row["labels"]) for row in ROWS]
RECIPE = make_recipe(lora={"dropout": 0, "target_modules": "all-linear"})


def loss_and_gradients(model: Any, losses: Any, batch: Any) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = losses(model, batch)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def packed(model: Any) -> PackedLoss:
    model.get_base_model().set_attn_implementation(PACKED)
    return PackedLoss(model.get_base_model())


@pytest.mark.parametrize("keeps", [True, False])
def test_loss_and_gradients_are_stocks_and_those_of_a_pack(keeps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora_model(RECIPE)
    stock_loss, stock = padded_loss_and_gradients(model, ROWS)
    whole, expected = loss_and_gradients(model, packed(model), pack(EXAMPLES))
    losses = PaddedLoss(model.get_base_model())
    if not keeps:
        monkeypatch.setattr(losses, "takes", losses.takes - {"logits_to_keep"})
    batch = pad(EXAMPLES)
    loss, gradients = loss_and_gradients(model, losses, batch)
    assert loss == pytest.approx(whole, rel=1e-6) and loss / batch.num_labels == pytest.approx(stock_loss, rel=1e-5)
    assert gradients.keys() == stock.keys() == expected.keys() and len(stock) == 2 * 2 * 7
    for name, gradient in gradients.items():
        assert relative(gradient, expected[name]) < 1e-5, name
        assert relative(gradient / batch.num_labels, stock[name]) < 1e-5, name


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
def test_dropout_is_that_of_a_pack_however_a_step_is_cut(targets: Any) -> None:
    model = lora_model(make_recipe(lora={"dropout": 0.3, "target_modules": targets}))
    masks, examples = DropoutMasks(model, seed=5), EXAMPLES[1:5]
    model.train()
    results = []
    for batching in get_args(Batching):
        losses: Any = losses_of(model.get_base_model(), batching)
        model.zero_grad()
        total = 0.0
        for batch in losses.within(200, examples, None):
            masks.draw(3, batch.places)
            loss = losses(model, batch)
            loss.backward()
            total += loss.item()
        results.append((total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    for total, gradients in results[1:]:
        assert total == pytest.approx(results[0][0], rel=1e-6)
        assert max(relative(gradients[name], grad) for name, grad in results[0][1].items()) < 1e-5


def test_it_is_known_by_token() -> None:
    model = lora_model(RECIPE)
    expected = packed(model).by_token(model, pack(EXAMPLES))
    found = PaddedLoss(model.get_base_model()).by_token(model, pad(EXAMPLES))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not found.requires_grad


def test_rows_without_labels_have_no_loss_and_no_gradient() -> None:
    model = lora_model(RECIPE)
    batch = pad([Example([5, 6, 7], [IGNORED] * 3), Example([8, 9], [IGNORED] * 2)])
    loss, gradients = loss_and_gradients(model, PaddedLoss(model.get_base_model()), batch)
    assert loss == 0 and gradients and not any(gradient.any() for gradient in gradients.values())
    assert len(PaddedLoss(model.get_base_model()).by_token(model, batch)) == 0


def test_own_attention_is_sdpa_or_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    base = lora_model(RECIPE).get_base_model()
    base.set_attn_implementation(PACKED)
    take_own_attention(base)
    assert base.config._attn_implementation == "sdpa"
    monkeypatch.setattr(LlamaForCausalLM, "_supports_sdpa", False)
    take_own_attention(base)
    assert base.config._attn_implementation == "eager"
