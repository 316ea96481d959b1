"""Trainers of a tiny model, for tests."""

from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from huarizo.data.packing import StepCollator
from huarizo.events import Events
from huarizo.model.lora import add_lora
from huarizo.plan import Batching, Choice
from huarizo.recipe import Recipe
from huarizo.runs import Run
from huarizo.training.interrupt import Signals
from huarizo.training.metrics import Metrics
from huarizo.training.progress import Terminal
from huarizo.training.saving import Saver, Stopping
from huarizo.training.trainer import LoraTrainer, training_arguments
from tests.tiny import make_model


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
    rows_so_far: Any = None, batching: Batching = "packed",
) -> LoraTrainer:  # fmt: skip
    run, cpu = Run(tmp_path / "run"), torch.device("cpu")
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    args = training_arguments(recipe, run, Choice("fp32", "test", torch.float32), cpu)
    metrics = Metrics(tmp_path / "metrics.jsonl", rows_so_far or [])
    events = Events([Terminal(console or Console(quiet=True)), metrics])
    saver = Saver(run, recipe, {}, metrics, events, budget) if recipe.training.save_every else None
    return LoraTrainer(
        model, args, rows, [], recipe, budget, events=events, saver=saver, stopping=Stopping(Signals()),
        elapsed_before=metrics.elapsed_s, batching=batching,
    )  # fmt: skip


def packed_loss_and_gradients(trainer: LoraTrainer, examples: list[Any]) -> tuple[float, dict[str, torch.Tensor]]:
    trainer.model.zero_grad()
    loss = trainer.training_step(trainer.model, StepCollator()(examples))
    return loss.item(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def printed(console: Console) -> str:
    file: Any = console.file
    return file.getvalue()


def edit_recipe(run: Run, key: str, value: Any) -> None:
    values = yaml.safe_load(run.recipe_file.read_text())
    section = values
    *parts, last = key.split(".")
    for part in parts:
        section = section[part]
    section[last] = value
    run.recipe_file.write_text(yaml.safe_dump(values))
