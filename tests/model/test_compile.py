"""Compiled layers give what uncompiled ones give, and where nothing compiles the reason is told."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from huarizo.data.packing import PackedBatch, pack
from huarizo.data.tokens import Example
from huarizo.model import compile as compiling
from huarizo.model.compile import compile_layers, uncompiled, why_not
from huarizo.model.dropout import DropoutMasks
from huarizo.model.frozen.load import load_quantised_base
from huarizo.model.load import load_base
from huarizo.model.lora import add_lora
from huarizo.model.loss import PackedLoss
from huarizo.recipe import make_recipe
from tests.tiny import make_model

CPU = torch.device("cpu")
REASON = why_not(CPU)
compiles = pytest.mark.skipif(REASON is not None, reason=f"nothing compiles here: {REASON}")


def batch_of(lengths: list[int], seed: int = 0) -> PackedBatch:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(4, 260, (length,), generator=generator).tolist() for length in lengths]
    return pack([Example(row, [-100] * (len(row) // 3) + row[len(row) // 3 :]) for row in rows])


BATCHES = [batch_of([5, 70, 33]), batch_of([129]), batch_of([2, 3, 64], seed=1)]


def model_of(folder: Path, precision: str, dropout: float) -> Any:
    if precision == "int8":
        base = load_quantised_base(folder, "int8", torch.bfloat16, CPU, BATCHES[0])
    else:
        base = load_base(folder, {"fp32": torch.float32, "bf16": torch.bfloat16}[precision], CPU)
    model = add_lora(base, make_recipe(lora={"dropout": dropout}).lora, seed=1).train()
    DropoutMasks(model, seed=9)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def losses_and_gradients(model: Any, compiled: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    loss, losses = PackedLoss(model.get_base_model(), compiled), []
    model.zero_grad()
    for batch in BATCHES:
        value = loss(model, batch)
        value.backward()
        losses.append(float(value))
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@compiles
@pytest.mark.parametrize(("precision", "close"), [("fp32", 1e-5), ("bf16", 3e-2), ("int8", 6e-2)])
def test_compiled_equals_uncompiled(precision: str, close: float, tmp_path: Path) -> None:
    make_model(initializer_range=0.1).save_pretrained(tmp_path)
    model = model_of(tmp_path, precision, dropout=0.3)
    with uncompiled():
        plain_losses, plain = losses_and_gradients(model, compiled=False)
    compile_layers(model)
    losses, gradients = losses_and_gradients(model, compiled=True)
    assert losses == pytest.approx(plain_losses, rel=close / 10)
    assert gradients.keys() == plain.keys() and len(gradients) == 8
    for name, gradient in gradients.items():
        assert float((gradient - plain[name]).norm() / plain[name].norm()) < close, name
    again, same = losses_and_gradients(model, compiled=True)
    assert again == losses and all(torch.equal(same[name], gradients[name]) for name in gradients)


def test_a_compiler_that_fails_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("\n  no C++ compiler was found\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    assert why_not(CPU) == "the compiler does not work here (no C++ compiler was found)"


def test_a_card_is_asked_by_compiling_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch, "ones", lambda size, device: torch.zeros(size))
    tried = []
    monkeypatch.setattr(torch, "compile", lambda function: lambda x: tried.append(x))
    assert why_not(torch.device("cuda")) is None and len(tried) == 1


def test_other_devices_run_uncompiled() -> None:
    assert why_not(torch.device("mps")) == "mps is used uncompiled"


@compiles
def test_compiled_code_is_kept_in_our_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())  # as torch itself sets it
    compiling.keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "huarizo" / "compiled")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/chosen/by/the/user")
    compiling.keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/chosen/by/the/user"


@pytest.mark.parametrize("compiled", [False, True])
def test_activation_checkpointing_changes_no_gradient(compiled: bool, tmp_path: Path) -> None:
    if compiled and REASON:
        pytest.skip(f"nothing compiles here: {REASON}")
    make_model(initializer_range=0.1).save_pretrained(tmp_path)
    model = model_of(tmp_path, "fp32", dropout=0.3)
    plain_losses, plain = losses_and_gradients(model, compiled=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if compiled:
        compile_layers(model)
    losses, gradients = losses_and_gradients(model, compiled)
    assert losses == pytest.approx(plain_losses, rel=1e-6)
    assert max(float((gradients[n] - plain[n]).norm() / plain[n].norm()) for n in plain) < 1e-5
