"""What is planned before a run: micro-batches, and activation checkpointing where the longest row would not fit."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from huarizo import machine
from huarizo.machine import Choice
from huarizo.model.load import activation_bytes_per_token, weight_bytes
from huarizo.model.lora import count_weights
from huarizo.recipe import make_recipe
from huarizo.training import finetune
from huarizo.training.finetune import fine_tune
from huarizo.training.prepare import _fit_memory, prepare
from tests.tiny import make_model

TINYLLAMA = {
    "model_type": "llama",
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4, "vocab_size": 32000,
}  # fmt: skip
INT8 = Choice("int8", "", torch.bfloat16)


def planned(free_gb: float, **recipe: Any) -> tuple[int | None, bool]:
    made = make_recipe(**recipe)
    _fit_memory(made, TINYLLAMA, INT8, int(free_gb * 1e9))
    return made.training.micro_batch_tokens, made.trainer.get("gradient_checkpointing", False)


def test_the_weights_of_a_known_model() -> None:
    model = make_model()
    config = model.config.to_dict()
    norms = sum(parameter.numel() for name, parameter in model.named_parameters() if "norm" in name)
    assert weight_bytes(config, "fp32", torch.float32) == 4 * (count_weights(model) - norms)
    assert weight_bytes(TINYLLAMA, "int8", torch.bfloat16) == 968_884_224 + (1 + 2) * 32000 * 2048
    tied = TINYLLAMA | {"tie_word_embeddings": True}
    assert weight_bytes(tied, "int8", torch.bfloat16) == weight_bytes(TINYLLAMA, "int8", torch.bfloat16)
    assert 3e6 < activation_bytes_per_token(TINYLLAMA, torch.bfloat16) < 6e6


def test_with_room_a_micro_batch_is_as_large_as_gains_speed() -> None:
    assert planned(22) == (1024, False)


def test_with_less_room_it_is_smaller() -> None:
    tokens, checkpointing = planned(6)
    assert tokens is not None and 512 <= tokens < 1024 and not checkpointing


@pytest.mark.parametrize("free_gb", [4, 1.5, 0.1])
def test_where_the_longest_row_does_not_fit_activations_are_computed_again(free_gb: float) -> None:
    assert planned(free_gb) == (512, True)


def test_what_the_user_sets_is_kept() -> None:
    assert planned(1.5, training={"micro_batch_tokens": 300}) == (300, False)
    tokens, checkpointing = planned(1.5, trainer={"gradient_checkpointing": False})
    assert not checkpointing and tokens is not None and tokens >= 64


def test_a_held_out_prompt_without_room_for_an_answer_is_no_sample(tiny_model_folder: Path, tmp_path: Path) -> None:
    files = {"train": ["Hi", "Hello"], "eval": ["x" * 3000, "Who are you?"]}  # bytes are tokens; 2048 positions
    for name, instructions in files.items():
        rows = [{"instruction": text, "input": "", "output": "Huarizo."} for text in instructions]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    recipe = make_recipe(
        model=str(tiny_model_folder), data={name: str(tmp_path / f"{name}.json") for name in files}, precision="fp32",
        samples=2, training={"compile": False}, output=str(tmp_path / "run"),
    )  # fmt: skip
    result = fine_tune(recipe, "run", Console(file=io.StringIO()))
    assert [sample.instruction for sample in result.samples] == ["Who are you?"]


def test_a_long_training_in_float_on_a_cpu_says_why_and_how_long(
    tiny_model_folder: Path, alpaca_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare(make_recipe(model=str(tiny_model_folder), data={"train": str(alpaca_file)}, precision="fp32"))
    monkeypatch.setattr("huarizo.training.finetune.reason_against", lambda dtype: "no compiler")
    monkeypatch.setattr("huarizo.training.finetune.int8_instructions", list)
    monkeypatch.setattr(machine, "gemm_rate", lambda *args, **kwargs: 100.0)
    few = finetune._told_of_the_cpu(prepared, 1000)
    assert few == {"kernels": "none, plain torch instead: no compiler"}
    weights = weight_bytes(make_model().config.to_dict(), "fp32", torch.float32) / 4
    tokens = int(100e9 * 60 * 7 / (4 * weights))  # 7 minutes at the full rate of the products
    assert finetune._told_of_the_cpu(prepared, tokens)["time"] == (
        "slow here, for want of int8 instructions (VNNI, AMX): about 9 to 20 minutes in fp32"
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_activation_checkpointing_changes_no_gradient(compiled: bool, tmp_path: Path) -> None:
    from huarizo.model.compile import compile_layers
    from tests.model.test_compile import CPU, REASON, losses_and_gradients, model_of

    if compiled and REASON:
        pytest.skip(f"nothing compiles here: {REASON}")
    make_model(initializer_range=0.1).save_pretrained(tmp_path)
    model = model_of(tmp_path, "fp32", dropout=0.3)
    plain_losses, plain = losses_and_gradients(model, compiled=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if compiled:
        assert compile_layers(model, CPU) is None
    losses, gradients = losses_and_gradients(model, compiled)
    assert losses == pytest.approx(plain_losses, rel=1e-6)
    assert max(float((gradients[n] - plain[n]).norm() / plain[n].norm()) for n in plain) < 1e-5
