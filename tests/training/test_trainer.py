"""One packed step, and whole runs, against stock Transformers and PEFT on the same rows."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from huarizo.data.packing import StepCollator, order
from huarizo.data.prompts import TextFormat, alpaca
from huarizo.data.rows import Exchange, Row
from huarizo.data.tokens import Encoder
from huarizo.model.lora import add_lora
from huarizo.plan import Batching, Choice
from huarizo.recipe import load_recipe, make_recipe
from huarizo.runs import Run
from huarizo.training.trainer import training_arguments
from tests.stock import padded_loss_and_gradients, tutorial_run
from tests.tiny import make_model
from tests.training.make import lora_model, make_trainer, packed_loss_and_gradients, random_examples, relative

RECIPES = Path(__file__).parents[2] / "recipes"
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "no grouping, tied head": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "attention bias, llama3 rope": {
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("target_modules", [["q_proj", "v_proj"], "all-linear", ["q_proj", "lm_head"]])
def test_a_packed_step_equals_stock_on_padded_rows(variant: str, target_modules: Any, tmp_path: Path) -> None:
    if "tied head" in variant and "lm_head" in target_modules:
        pytest.skip("peft warns against an adapter on a tied head")
    recipe = make_recipe(lora={"dropout": 0, "target_modules": target_modules})
    examples = random_examples([2, 63, 64, 65, 129, 7])
    model = lora_model(recipe, **VARIANTS[variant])
    loss, gradients = padded_loss_and_gradients(model, examples)
    packed_loss, packed_gradients = packed_loss_and_gradients(make_trainer(model, recipe, examples, tmp_path), examples)
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    assert gradients.keys() == packed_gradients.keys() and len(gradients) > 4
    assert max(relative(packed_gradients[name], gradients[name]) for name in gradients) < 1e-5


@pytest.mark.parametrize("batching", ["padded", "alone"])
@pytest.mark.parametrize("noise", [None, 5.0])
def test_a_padded_step_equals_a_packed_one(batching: Batching, noise: float | None, tmp_path: Path) -> None:
    recipe = make_recipe(lora={"dropout": 0.3}, trainer={"neftune_noise_alpha": noise} if noise else {})
    examples: Any = random_examples([2, 63, 64, 65, 129, 7, 60])
    results = []
    for kind in ("packed", batching):
        trainer = make_trainer(lora_model(recipe), recipe, examples, tmp_path, budget=200, batching=kind)
        with torch.no_grad():
            heldout_sums = trainer._heldout_sums(examples)
        results.append((*packed_loss_and_gradients(trainer, examples), heldout_sums))
    (loss, gradients, heldout), (padded_loss, padded_gradients, padded_heldout) = results
    assert padded_loss == pytest.approx(loss, rel=1e-6) and gradients.keys() == padded_gradients.keys()
    assert max(relative(padded_gradients[name], gradients[name]) for name in gradients) < 1e-5
    torch.testing.assert_close(padded_heldout, heldout)
    again = make_trainer(lora_model(recipe), recipe, examples, tmp_path, budget=200, batching=batching)
    same_loss, same_gradients = packed_loss_and_gradients(again, examples)
    assert same_loss == padded_loss, "to the bit"
    assert all(torch.equal(gradient, same_gradients[name]) for name, gradient in padded_gradients.items())


@pytest.mark.parametrize("count", [1, 2, 5])
def test_micro_batches_change_nothing(count: int, tmp_path: Path) -> None:
    recipe = make_recipe(lora={"dropout": 0})
    examples = random_examples([40] * 10)
    trainer = make_trainer(lora_model(recipe), recipe, examples, tmp_path, budget=400 // count)
    assert len(StepCollator()(examples).micro_batches(trainer.budget)) == count
    loss, gradients = packed_loss_and_gradients(trainer, examples)
    trainer.budget = 10_000
    whole_loss, whole_gradients = packed_loss_and_gradients(trainer, examples)
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    assert max(relative(gradients[name], whole_gradients[name]) for name in gradients) < 1e-6


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_processes_share_a_step_without_loss_or_repetition(world_size: int) -> None:
    examples = random_examples([10, 20, 30, 40, 50])
    shares = [StepCollator(rank, world_size)(examples) for rank in range(world_size)]
    assert {share.num_labels for share in shares} == {StepCollator()(examples).num_labels}
    learnt = sum(batch.num_labels for share in shares for batch in share.micro_batches(4096))
    assert learnt == shares[0].num_labels


def test_the_seed_recipe_follows_the_tutorials_own_run(
    tmp_path: Path, tinyllama_folder: Path, tinyllama_tokenizer: Any, real_rows_file: Path
) -> None:
    rows = json.loads(real_rows_file.read_text())[:100]
    folder = tmp_path / "model"
    make_model(vocab_size=32000, bos_token_id=1, eos_token_id=2, pad_token_id=2, initializer_range=0.2).save_pretrained(
        folder
    )
    stock_losses, stock_weights = tutorial_run(
        folder, rows, tinyllama_tokenizer, tmp_path / "stock", steps=20, dropout=0.0
    )

    recipe = load_recipe(RECIPES / "seed.yaml", ["lora.dropout=0", "training.max_steps=20"])
    encoder = Encoder(
        tinyllama_tokenizer,
        TextFormat("alpaca", alpaca, "</s>", with_stop=recipe.data.eos),
        recipe.data.labels,
        recipe.data.max_length,
    )
    ours = [Row("rows", i, "", (Exchange(r["instruction"], r["input"], r["output"]),)) for i, r in enumerate(rows)]
    examples = [{"input_ids": e.input_ids, "labels": e.labels} for e in encoder.encode(ours) if e]
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    trainer = make_trainer(add_lora(model, recipe.lora, recipe.training.seed), recipe, examples, tmp_path)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == len(stock_losses) == 20
    assert max(losses) - min(losses) > 0.1  # the rows of a step show in its loss
    assert losses == pytest.approx(stock_losses, abs=1e-3)
    weights = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert max(float((weights[n] - w).abs().max()) for n, w in stock_weights.items()) < 1e-3


def test_the_order_of_rows_is_a_pure_function_of_seed_and_epoch() -> None:
    assert order(50, 1, 0) == order(50, 1, 0)
    assert sorted(order(50, 1, 0)) == list(range(50))
    assert order(50, 1, 0) != order(50, 2, 0) and order(50, 1, 0) != order(50, 1, 1)


def test_loraplus_gives_b_a_learning_rate_of_its_own(tmp_path: Path) -> None:
    recipe = make_recipe(lora={"loraplus_lr_ratio": 16}, training={"learning_rate": 1e-4, "max_steps": 2})
    model = lora_model(recipe)
    trainer = make_trainer(model, recipe, random_examples([20, 30]), tmp_path)
    optimizer = trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, rate in rates.items():
        assert rate == pytest.approx(1.6e-3 if "lora_B" in name else 1e-4), name
    assert trainer.train().global_step == 2


def test_no_copies_of_the_model_and_no_exchange_of_frozen_weights(tmp_path: Path) -> None:
    args = training_arguments(make_recipe(), Run(tmp_path), Choice("fp32", "test", torch.float32), torch.device("cpu"))
    assert args.ddp_broadcast_buffers is False and args.ddp_find_unused_parameters is False
    assert args.n_gpu <= 1


ROOT = Path(__file__).parents[2]


def test_two_processes_have_the_losses_of_one(tmp_path: Path, tiny_model_folder: Path, alpaca_file: Path) -> None:
    recipe = {
        "model": str(tiny_model_folder), "data": {"train": str(alpaca_file), "eval": 3}, "precision": "fp32", "samples": 1,
        "lora": {"dropout": 0}, "training": {"batch_size": 4, "epochs": 3, "learning_rate": 1e-2, "eval_every": 2},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    results = []
    for name, launcher in (("one", []), ("two", torchrun)):
        command = [sys.executable, *launcher, "-m", "huarizo", "train", "recipe.yaml", f"output={name}"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[-1] == name and done.stdout.count("done:") == 1
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses = [(row["step"], row.get("loss"), row.get("eval_loss"), row.get("tokens")) for row in rows]
        results.append((losses, load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")))
    (one, weights_one), (two, weights_two) = results
    assert [(step, tokens) for step, _, _, tokens in one] == [(step, tokens) for step, _, _, tokens in two]
    assert [row[1] for row in two if row[1]] == pytest.approx([row[1] for row in one if row[1]], rel=1e-5)
    assert [row[2] for row in two if row[2]] == pytest.approx([row[2] for row in one if row[2]], rel=1e-5)
    assert max(float((weights_two[name] - tensor).abs().max()) for name, tensor in weights_one.items()) < 1e-4


def test_two_processes_stop_together_and_resume_bit_identically(
    tmp_path: Path, tiny_model_folder: Path, alpaca_file: Path
) -> None:
    recipe = {
        "model": str(tiny_model_folder), "data": {"train": str(alpaca_file), "eval": 3}, "precision": "fp32", "samples": 1,
        "lora": {"dropout": 0.3}, "training": {"batch_size": 3, "epochs": 2, "compile": False},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def both(*arguments: str) -> subprocess.CompletedProcess[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [sys.executable, *launcher, "-m", "huarizo", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    assert both("train", "recipe.yaml", "output=whole").returncode == 0
    stopped = both("train", "recipe.yaml", "output=stopped", "training.max_minutes=0.00001")
    assert stopped.returncode != 0 and "after step 1 of 6, which is saved" in stopped.stderr, stopped.stderr
    file = tmp_path / "stopped" / "recipe.yaml"
    file.write_text(file.read_text().replace("max_minutes: 1.0e-05", "max_minutes: null"))
    resumed = both("resume", "stopped")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from step 1" in resumed.stdout and "changed since" not in resumed.stdout
    adapters = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "stopped")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
