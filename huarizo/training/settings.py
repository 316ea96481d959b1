"""Tries the recipe's `trainer:` settings for one step, on a tiny Llama, before anything else is done.

Which optimizers, schedules and trackers work depends on the installed packages and on the device, and each library
fails in its own way and at its own time. Here they are created, stepped, saved and restored, so settings that pass will
train.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from peft import PeftModel

from huarizo.errors import RecipeError
from huarizo.model.lora import add_lora
from huarizo.plan import Choice
from huarizo.recipe import LoraRecipe, Recipe
from huarizo.runs import Run
from huarizo.training.checkpoint import Checkpoint, contents, generators
from huarizo.training.divergence import LossWatch
from huarizo.training.trainer import LoraTrainer, training_arguments
from huarizo.wording import did_you_mean, first_line

STEPS_WITH_BACKWARD = ("lomo", "adalomo")
PACKAGES = {
    "clearml": "clearml", "codecarbon": "codecarbon", "comet_ml": "comet-ml", "dagshub": "dagshub mlflow",
    "dvclive": "dvclive", "kubeflow": "kubeflow", "mlflow": "mlflow", "neptune": "neptune", "swanlab": "swanlab",
    "tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb",
}  # fmt: skip
"""Trackers that Transformers can detect, with the packages to install."""


def check_trainer_settings(recipe: Recipe, choice: Choice, on: torch.device) -> None:
    """Check that the settings of `trainer:` work together: they train a step, and a checkpoint can hold their state.

    Raises:
        RecipeError: one of them fails; the message names it, and what to install or write instead.
    """
    if not recipe.trainer:
        return
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        run = Run(Path(folder))
        with _mistakes_in("trainer"):
            args = training_arguments(recipe, run, choice, on)
        _check_trackers(args.report_to)
        optim, schedule = (str(getattr(name, "value", name)) for name in (args.optim, args.lr_scheduler_type))
        if optim in STEPS_WITH_BACKWARD or optim.endswith("layerwise"):
            raise RecipeError(
                f"trainer.optim: {optim} changes weights during the backward pass, but a step here has several "
                "micro-batches. Use another, such as adamw_torch"
            )
        with _mistakes_in("trainer"):
            trainer = LoraTrainer(_small_model(), args, [], [], recipe, 64)
        with _mistakes_in(f"trainer.optim={optim}"):
            trainer.create_optimizer()
        with _mistakes_in(f"trainer.lr_scheduler_type={schedule}"):
            trainer.create_scheduler(10, trainer.optimizer)
        with _mistakes_in(f"trainer.optim={optim}"):
            _step_and_restore(trainer)


def _check_trackers(names: str | Sequence[str] | None) -> None:
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


def _small_model() -> PeftModel:
    """A Llama of one tiny layer, with LoRA."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    return add_lora(LlamaForCausalLM(config).requires_grad_(False), LoraRecipe(r=1), 0)


def _step_and_restore(trainer: LoraTrainer) -> None:
    """Take one step with made-up gradients, then save and restore the optimizer as a checkpoint does."""
    trained = dataclasses.replace(trainer.trained(), scaler=None)
    for parameter in trained.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    trained.optimizer.step()
    Checkpoint(Path(), {}, contents(trained, [generators()], LossWatch().state())).restore_optimizer(trained)


@contextlib.contextmanager
def _mistakes_in(what: str) -> Iterator[None]:
    """Turn any error of a library into a RecipeError about `what`."""
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:  # libraries raise exceptions of any type for a wrong setting
        raise RecipeError(f"{what}: {first_line(error)}") from None
