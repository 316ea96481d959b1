"""One packed step, and whole runs, against stock Transformers and PEFT on the same rows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from huarizo.data.packing import StepCollator, order
from huarizo.data.prompts import TextFormat, alpaca
from huarizo.data.rows import Exchange, Row
from huarizo.data.tokens import Encoder
from huarizo.events import Events
from huarizo.model.attention import NAME as PACKED
from huarizo.model.lora import add_lora
from huarizo.plan import Choice
from huarizo.recipe import Recipe, load_recipe, make_recipe
from huarizo.runs import Run
from huarizo.training.interrupt import Signals
from huarizo.training.metrics import Metrics
from huarizo.training.progress import Terminal
from huarizo.training.saving import Saver, Stopping
from huarizo.training.trainer import LoraTrainer, training_arguments
from tests.stock import padded_loss_and_gradients, tutorial_run
from tests.tiny import make_model

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


def random_examples(lengths: list[int], seed: int = 0) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for length in lengths:
        ids = torch.randint(4, 260, (length,), generator=generator).tolist()
        examples.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return examples


def lora_model(recipe: Recipe, **config: Any) -> Any:
    """A tiny Llama with the recipe's LoRA, B drawn at random so that every gradient is alive."""
    model = add_lora(make_model(**config).requires_grad_(False), recipe.lora, recipe.training.seed)
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def make_trainer(
    model: Any, recipe: Recipe, rows: Any, tmp_path: Path, budget: int = 4096, console: Any = None,
    rows_so_far: Any = None,
) -> LoraTrainer:  # fmt: skip
    model.get_base_model().set_attn_implementation(PACKED)
    run, cpu = Run(tmp_path / "run"), torch.device("cpu")
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    args = training_arguments(recipe, run, Choice("fp32", "test", torch.float32), cpu)
    metrics = Metrics(tmp_path / "metrics.jsonl", rows_so_far or [])
    events = Events([Terminal(console or Console(quiet=True)), metrics])
    saver = Saver(run, recipe, {}, metrics, events, budget) if recipe.training.save_every else None
    return LoraTrainer(
        model, args, rows, [], recipe, budget, events=events, saver=saver, stopping=Stopping(Signals()),
        elapsed_before=metrics.elapsed_s,
    )  # fmt: skip


def packed_loss_and_gradients(trainer: LoraTrainer, examples: list[Any]) -> tuple[float, dict[str, torch.Tensor]]:
    trainer.model.zero_grad()
    loss = trainer.training_step(trainer.model, StepCollator()(examples))
    return loss.item(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


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
