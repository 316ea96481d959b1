"""LoRA on a 16-bit base: PEFT's own result, computed in the dtype of the activations."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear

from huarizo.model.float_lora import FloatLoraLinear
from huarizo.model.lora import add_lora
from huarizo.recipe import make_recipe
from tests.tiny import make_model

TARGETS = ["q_proj", "down_proj"]


def test_it_equals_pefts_up_to_rounding_and_keeps_fp32_weights() -> None:
    torch.manual_seed(0)
    base, grads = make_model().bfloat16().requires_grad_(False), []
    x = torch.randint(4, 200, (1, 40))
    for ours in (True, False):
        lora = make_recipe(lora={"r": 4, "alpha": 8, "dropout": 0, "target_modules": TARGETS}).lora
        config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
        model = copy.deepcopy(base)
        model = add_lora(model, lora, 1) if ours else get_peft_model(model, config)
        torch.manual_seed(2)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model(input_ids=x, labels=x).loss.backward()
        grads.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None])
        )
        assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert float((grads[0] - grads[1]).norm() / grads[1].norm()) < 0.05


def test_nothing_is_computed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the input nor the sum takes twice the bytes."""
    torch.manual_seed(0)
    layer = FloatLoraLinear(
        torch.nn.Linear(32, 48, bias=False).bfloat16().requires_grad_(False), "default",
        LoraConfig(init_lora_weights=False), r=4, lora_alpha=8,
    )  # fmt: skip
    for linear in (layer.lora_A["default"], layer.lora_B["default"]):
        linear.float()  # as get_peft_model leaves them
    wide = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: wide.append(t) or t, lambda t: t):
        layer(torch.randn(7, 32).bfloat16().requires_grad_()).sum().backward()
    assert not [t for t in wide if t.dtype == torch.float32 and 7 in t.shape]


def test_fp32_and_variants_are_pefts_own() -> None:
    torch.manual_seed(0)
    for dtype, options in ((torch.float32, {}), (torch.bfloat16, {"use_dora": True})):
        config = LoraConfig(init_lora_weights=False, **options)
        base = torch.nn.Linear(32, 48).to(dtype).requires_grad_(False)
        ours = FloatLoraLinear(base, "default", config, r=4, lora_alpha=8).eval()
        stock = Linear(base, "default", config, r=4, lora_alpha=8).eval()
        stock.load_state_dict(ours.state_dict())
        x = torch.randn(5, 32).to(dtype)
        assert torch.equal(ours(x), stock(x))
