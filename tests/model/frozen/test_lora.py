"""LoRA on the int8 base: every shape that PEFT names, a gradient for every matrix, and an ordinary adapter."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from huarizo.errors import RecipeError
from huarizo.model.frozen.int8 import Int8Linear
from huarizo.model.frozen.load import load_quantised_base
from huarizo.model.frozen.lora import FrozenLoraLinear
from huarizo.model.load import load_base
from huarizo.model.lora import add_lora
from huarizo.model.loss import PackedLoss
from huarizo.model.merge import MergedWeights
from huarizo.recipe import make_recipe
from tests.model.frozen.test_int8 import calibration
from tests.tiny import make_model

CPU = torch.device("cpu")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model(initializer_range=0.1).save_pretrained(tmp_path)
    return tmp_path


def int8_model(folder: Path, **lora: Any) -> Any:
    base = load_quantised_base(folder, "int8", torch.float32, CPU, calibration())
    return add_lora(base, make_recipe(lora={"dropout": 0, **lora}).lora, seed=1)


def loss_of(model: Any) -> torch.Tensor:
    return PackedLoss(model.get_base_model())(model, calibration((17, 40)))


@pytest.mark.parametrize(
    "lora",
    [{}, {"target_modules": "all-linear", "r": 3, "alpha": 7}, {"target_modules": ["down_proj", "o_proj"]},
     {"target_modules": ["k_proj", "lm_head"]}, {"options": {"use_rslora": True}},
     {"options": {"init_lora_weights": "gaussian"}}, {"options": {"init_lora_weights": "pissa"}},
     {"options": {"init_lora_weights": "olora"}},
     {"options": {"init_lora_weights": "orthogonal"}}, {"options": {"rank_pattern": {"q_proj": 2}}}],
    ids=str,
)  # fmt: skip
def test_every_matrix_gets_the_gradient_of_the_float_model(lora: dict[str, Any], folder: Path) -> None:
    model = int8_model(folder, **lora)
    plain = add_lora(load_base(folder, torch.float32, CPU), make_recipe(lora={"dropout": 0, **lora}).lora, seed=1)
    gradients = []
    for each in (model, plain):
        torch.manual_seed(3)
        for name, parameter in each.named_parameters():
            if "lora_B" in name:
                parameter.data += torch.randn(parameter.shape) * 0.02
        loss_of(each).backward()
        gradients.append({n: p.grad for n, p in each.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().max() > 0, name
        if "pissa" not in str(lora):  # whose singular vectors have no sign of their own
            assert torch.nn.functional.cosine_similarity(gradient.flatten(), gradients[1][name].flatten(), dim=0) > 0.95


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_init_that_takes_from_the_weight_leaves_the_model_as_it_was(init: str, folder: Path) -> None:
    base = load_quantised_base(folder, "int8", torch.float32, CPU, calibration())
    with torch.no_grad():
        before = float(PackedLoss(base)(base, calibration()))
        model = add_lora(base, make_recipe(lora={"dropout": 0, "options": {"init_lora_weights": init}}).lora, seed=1)
        after = float(PackedLoss(base)(model, calibration()))
        model.disable_adapter_layers()
        without = float(PackedLoss(base)(model, calibration()))
    assert after == pytest.approx(before, rel=1e-3)
    assert without != pytest.approx(before, rel=1e-4)  # what the adapter took is no longer in the int8 weight
    weights = {m.plain()[0].dtype for m in model.modules() if isinstance(m, Int8Linear)}
    assert weights == {torch.int8}


def test_what_does_not_work_is_refused_in_words(folder: Path) -> None:
    with pytest.raises(RecipeError, match="not supported with precision int8. Use precision=bf16"):
        int8_model(folder, options={"use_dora": True})


def test_no_adapter_is_merged_into_int8(folder: Path) -> None:
    model = int8_model(folder)
    with pytest.raises(ValueError, match="merged into int8 weights"):
        model.merge_and_unload()


def test_the_adapter_is_an_ordinary_one(folder: Path, tmp_path: Path) -> None:
    model = int8_model(folder, target_modules="all-linear")
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(str(tmp_path / "adapter"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert "int8" not in json.dumps(config).lower() and sorted(config["target_modules"]) == sorted(ALL)
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 2 * 2 * len(ALL)
    stock = PeftModel.from_pretrained(load_base(folder, torch.float32, CPU), str(tmp_path / "adapter"))
    with torch.no_grad():
        assert float(loss_of(stock)) == pytest.approx(float(loss_of(model)), rel=5e-3)
        with stock.disable_adapter():
            assert float(loss_of(stock)) != pytest.approx(float(loss_of(model)), rel=2e-2)


def test_peft_makes_our_layer(folder: Path) -> None:
    made = [module for module in int8_model(folder).modules() if isinstance(module, FrozenLoraLinear)]
    assert len(made) == 4  # q_proj and v_proj of two layers: the hook for custom modules still works


def test_an_adapter_trained_on_int8_is_merged_into_the_float_weights(folder: Path, tmp_path: Path) -> None:
    model = int8_model(folder, target_modules=ALL)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    merged, base = MergedWeights(folder, tmp_path / "adapter"), load_file(folder / "model.safetensors")
    parts = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, weight in base.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        expected = weight
        if f"{module}.lora_A.weight" in parts:
            expected = weight + 2 * parts[f"{module}.lora_B.weight"] @ parts[f"{module}.lora_A.weight"]
            assert not torch.equal(merged[name], weight)
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-6)
