"""The lines printed before training starts, such as the estimated time."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.small_models import save_small, small_config
from huarizo import machine
from huarizo.events import Event, Events, Noted
from huarizo.kernels import attention
from huarizo.model.load import weight_bytes
from huarizo.recipe import make_recipe
from huarizo.runs import Run
from huarizo.training.announcement import announce, cpu_lines
from huarizo.training.prepare import prepare
from tests.cpus import AVX2, pretend
from tests.tiny import make_model


def test_a_long_training_in_float_on_a_cpu_says_why_and_how_long(
    tiny_model_folder: Path, alpaca_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(make_recipe(model=str(tiny_model_folder), data={"train": str(alpaca_file)}, precision="fp32"))
    pretend(monkeypatch, AVX2, "no C compiler")
    monkeypatch.setattr(machine, "gemm_rate", lambda *args, **kwargs: 100.0)
    few = cpu_lines(prepared, 1000)
    assert few == {"kernels": "none: no C compiler. Plain torch computes the same, more slowly"}
    weights = weight_bytes(make_model().config.to_dict(), "fp32", torch.float32) / 4
    tokens = int(100e9 * 60 * 7 / (4 * weights))  # 7 minutes at the full rate of the products
    assert cpu_lines(prepared, tokens)["time"] == "slow without int8 products: about 9 to 20 minutes in fp32"
    pretend(monkeypatch, AVX2)
    assert cpu_lines(prepared, tokens) == {"time": "about 9 to 20 minutes in fp32"}
    monkeypatch.setattr(attention, "library", lambda: "it was not compiled")
    assert cpu_lines(prepared, 1000)["kernels"].startswith("no attention: it was not compiled")


def test_what_gets_no_lora_is_said(tmp_path: Path, tiny_tokenizer: Any, alpaca_file: Path) -> None:
    folder = save_small(small_config("qwen3_moe", vocab_size=260), tmp_path / "moe")
    tiny_tokenizer.save_pretrained(folder)
    for targets, said in (
        ("all-linear", ["all linear layers but those that PEFT has no LoRA for: the experts"]),
        (["q_proj"], []),
    ):
        recipe = make_recipe(
            model=str(folder), data={"train": str(alpaca_file)}, precision="fp32", lora={"target_modules": targets}
        )
        heard = list[Event]()
        announce(prepare(recipe), Run(tmp_path / "run"), Events([heard.append]))
        assert [event.text for event in heard if isinstance(event, Noted) and event.title == "lora"] == said
