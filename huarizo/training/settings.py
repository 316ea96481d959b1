"""The recipe's `trainer:` is tried out before anything else is done: on a Llama of a few numbers, for one step.

Which optimizers, schedules and trackers work depends on what is installed and on the device, and each library says so
in its own way and at its own time. Here they are made, stepped, saved and put back, so that what is accepted trains.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from huarizo.errors import RecipeError
from huarizo.model.lora import add_lora
from huarizo.plan import Choice
from huarizo.recipe import LoraRecipe, Recipe
from huarizo.runs import Run
from huarizo.training.checkpoint import Checkpoint, Trained, contents, generators
from huarizo.training.trainer import LoraTrainer, training_arguments
from huarizo.wording import did_you_mean, first_line

STEPS_WITH_BACKWARD = ("lomo", "adalomo")
PACKAGES = {
    "clearml": "clearml", "codecarbon": "codecarbon", "comet_ml": "comet-ml", "dagshub": "dagshub mlflow",
    "dvclive": "dvclive", "kubeflow": "kubeflow", "mlflow": "mlflow", "neptune": "neptune", "swanlab": "swanlab",
    "tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb",
}  # fmt: skip
"""Trackers whose absence Transformers can tell, each with what pip installs it by."""


def check_trainer_settings(recipe: Recipe, choice: Choice, on: torch.device) -> None:
    """The settings of `trainer:` make a Trainer whose optimizer steps, and whose state a checkpoint can hold.

    Raises:
        RecipeError: one of them does not; the message says which, and what to install or write instead.
    """
    if not recipe.trainer:
        return
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        run = Run(Path(folder))
        with _told("trainer"):
            args = training_arguments(recipe, run, choice, on)
        _check_trackers(args.report_to)
        optim, schedule = (str(getattr(name, "value", name)) for name in (args.optim, args.lr_scheduler_type))
        if optim in STEPS_WITH_BACKWARD or optim.endswith("layerwise"):
            raise RecipeError(
                f"trainer.optim: {optim} changes weights during the backward pass, but a step here is of several "
                "micro-batches. Use another, such as adamw_torch"
            )
        with _told("trainer"):
            trainer = LoraTrainer(_small_model(), args, [], [], recipe, 64)
        with _told(f"trainer.optim={optim}"):
            trainer.create_optimizer()
        with _told(f"trainer.lr_scheduler_type={schedule}"):
            trainer.create_scheduler(10, trainer.optimizer)
        with _told(f"trainer.optim={optim}"):
            _step_and_go_on(trainer)


def _check_trackers(names: Any) -> None:
    from transformers.integrations import integration_utils

    known, there = integration_utils.INTEGRATION_TO_CALLBACK, integration_utils.get_available_reporting_integrations()
    problems = []
    for name in [names] if isinstance(names, str) else names or []:
        if name not in ("none", "all", *known):
            problems.append(f"{name!r} is none of {', '.join(sorted(known))}{did_you_mean(str(name), known)}")
        elif name in PACKAGES and name not in there:
            problems.append(f"{name} is not installed: pip install {PACKAGES[name]}, or leave it out")
    if problems:
        raise RecipeError(f"trainer.report_to: {'; '.join(problems)}")


def _small_model() -> Any:
    """A PeftModel around a Llama of one layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    return add_lora(LlamaForCausalLM(config).requires_grad_(False), LoraRecipe(r=1), 0)


def _step_and_go_on(trainer: LoraTrainer) -> None:
    """One step with made-up gradients, and the optimizer's state written and put back as a checkpoint does."""
    optimizer: Any = trainer.optimizer
    for parameter in trainer.model.parameters():  # pyright: ignore[reportOptionalMemberAccess]
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    trained = Trained(trainer.model, optimizer, trainer.lr_scheduler, None)
    Checkpoint(Path(), {}, contents(trained, [generators()], {})).restore_optimizer(trained)


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Whatever a library finds wrong, as a mistake in the recipe."""
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:  # libraries tell a wrong setting by any of theirs
        raise RecipeError(f"{what}: {first_line(error)}") from None
