"""Any storage that fulfils `FrozenLinear` is loaded, wrapped, counted and trained on, known by its row alone."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from huarizo.errors import RecipeError
from huarizo.model.frozen.linear import FrozenLinear, LowRank, input_gradient_of
from huarizo.model.frozen.load import load_quantised_base
from huarizo.model.frozen.lora import FrozenLoraLinear
from huarizo.model.frozen.storages import STORAGES, Storage
from huarizo.model.load import load_base, weight_bytes
from huarizo.model.lora import add_lora, check_lora, count_weights
from huarizo.model.loss import PackedLoss
from huarizo.model.targets import linear_names
from huarizo.recipe import make_recipe
from tests.model.frozen.test_int8 import calibration
from tests.tiny import make_model

CPU = torch.device("cpu")


class Bits(FrozenLinear):
    """Keeps a float32 weight as the integers of the same bits, which loses nothing, and rows that nothing reads."""

    storage = "bits"

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.dtype = linear.weight.dtype
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.register_buffer("weight", None)
        self.store(linear.weight.detach())

    def store(self, weight: torch.Tensor) -> None:
        self.weight = F.pad(weight.float().view(torch.int32), (0, 0, 0, 3))

    def dequantised(self) -> torch.Tensor:
        return self.weight[: self.out_features].view(torch.float32)

    def forward(self, x: torch.Tensor, low_rank: LowRank | None = None) -> torch.Tensor:
        y = F.linear(x, self.dequantised().to(x.dtype), self.bias)
        return y if low_rank is None else y + low_rank.product()

    def input_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        return grad @ self.dequantised().to(grad.dtype)


def quantise(linears: Sequence[nn.Linear], peaks: torch.Tensor) -> list[Bits]:
    assert peaks.shape == (linears[0].in_features,)
    return [Bits(linear) for linear in linears]


@pytest.fixture(autouse=True)
def _storage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        STORAGES, "bits", Storage(quantise=quantise, reason_against=lambda *_: None, bytes_per_weight=8)
    )


@pytest.mark.parametrize("init", [True, "pissa"])
def test_a_storage_that_loses_nothing_trains_as_the_float_model(init: bool | str, tmp_path: Path) -> None:
    make_model(initializer_range=0.1).save_pretrained(tmp_path)
    lora = make_recipe(lora={"dropout": 0, "target_modules": "all-linear", "options": {"init_lora_weights": init}}).lora
    plain, stored = load_base(tmp_path, torch.float32, CPU), calibration()
    ours = load_quantised_base(tmp_path, "bits", torch.float32, CPU, stored)
    assert linear_names(ours) == linear_names(plain) and count_weights(ours) == count_weights(plain)
    losses, gradients = [], []
    for base in (ours, plain):
        model = add_lora(base, lora, seed=1)
        loss = PackedLoss(base)(model, calibration((17, 40)))
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert sum(isinstance(module, FrozenLoraLinear) for module in ours.modules()) == 14
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-4)


def test_messages_and_estimates_know_it_by_name(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    dora = make_recipe(lora={"options": {"use_dora": True}}).lora
    with pytest.raises(RecipeError, match="use_dora: not supported with precision bits"):
        check_lora(tmp_path, dora, "bits")
    base = load_quantised_base(tmp_path, "bits", torch.float32, CPU, calibration())
    with pytest.raises(RecipeError, match="not supported with precision bits"):
        add_lora(base, dora, seed=1)
    config = base.config.to_dict()
    embedding = 4 * config["vocab_size"] * config["hidden_size"]
    in_floats = weight_bytes(config, "fp32", torch.float32)
    assert weight_bytes(config, "bits", torch.float32) == 2 * (in_floats - embedding) + embedding


def test_only_a_weight_and_a_bias_have_an_input_gradient_of_their_own() -> None:
    linear = nn.Linear(5, 3).requires_grad_(False)
    grad = torch.randn(4, 3)
    for layer in (linear, Bits(linear)):
        product = input_gradient_of(layer)
        assert product is not None
        torch.testing.assert_close(product(grad), grad @ linear.weight)
    assert input_gradient_of(nn.Sequential(linear)) is None
