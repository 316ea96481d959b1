"""Whole runs on a GPU, in every precision: the losses of a run on the CPU, few compilations, and resume to the bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from huarizo.events import Event, Step
from huarizo.recipe import Recipe, make_recipe
from huarizo.runs import Run
from huarizo.training.finetune import fine_tune, resume
from tests.tiny import make_model, make_tokenizer

STEPS = 12


def recipe_of(folder: Path, out: Path, precision: str) -> Recipe:
    return make_recipe(
        model=str(folder), data={"train": str(folder / "rows.json"), "eval": 6, "prompt": "alpaca"},
        lora={"r": 4, "target_modules": "all-linear"},
        training={"max_steps": STEPS, "batch_size": 5, "learning_rate": 1e-3, "save_every": 5},
        precision=precision, samples=1, output=str(out),
    )  # fmt: skip


def losses_in(run: Path) -> list[float]:
    rows = [json.loads(line) for line in Run(run).metrics.read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and rows whose lengths differ from step to step."""
    folder = tmp_path_factory.mktemp("model")
    make_model(hidden_size=256, intermediate_size=512).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    texts = [" ".join(map(str, range(n % 23 + 1))) for n in range(60)]
    rows = [{"instruction": f"count {n}", "input": "", "output": text} for n, text in enumerate(texts)]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[float]:
    """The losses of the same run in fp32 on the CPU."""
    recipe = recipe_of(folder, folder / "cpu", "fp32")
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True)))
    command = [sys.executable, "-m", "huarizo", "train", str(file), "training.compile=false"]
    subprocess.run(command, check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, stdout=subprocess.DEVNULL)
    return losses_in(folder / "cpu")


@pytest.mark.parametrize(("precision", "bar"), [("fp32", 2e-3), ("bf16", 2e-2), ("fp16", 5e-3), ("int8", 3e-2)])
def test_losses_are_those_of_the_cpu(
    folder: Path, expected: list[float], tmp_path: Path, precision: str, bar: float
) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    fine_tune(recipe_of(folder, tmp_path / "run", precision), console=Console(quiet=True))
    losses = losses_in(tmp_path / "run")
    assert len(losses) == STEPS
    assert max(abs(a - b) / b for a, b in zip(losses, expected, strict=True)) < bar
    compiled = counters["stats"]["unique_graphs"]
    assert compiled <= 4, f"{compiled} graphs: two of a layer and two of the loss at most"


def test_a_killed_run_resumes_to_the_bit(folder: Path, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def killer(event: Event) -> None:
        if isinstance(event, Step) and event.step == 7:
            raise Killed

    fine_tune(recipe_of(folder, tmp_path / "whole", "bf16"), console=Console(quiet=True))
    with pytest.raises(Killed):
        fine_tune(recipe_of(folder, tmp_path / "broken", "bf16"), console=Console(quiet=True), listeners=[killer])
    resume(Run(tmp_path / "broken"), Console(quiet=True))
    whole, broken = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "broken"))
    assert whole.read_bytes() == broken.read_bytes()
