"""A run from a recipe to the adapter, and what it leaves."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from huarizo.errors import Interrupted
from huarizo.events import Done, Event, Noted, Saved, Started, Step, Stopped
from huarizo.plan import Plan
from huarizo.recipe import Recipe, make_recipe
from huarizo.runs import Run
from huarizo.training.finetune import fine_tune, resume


@pytest.fixture
def recipe(tiny_model_folder: Path, alpaca_file: Path, tmp_path: Path) -> Recipe:
    return make_recipe(
        model=str(tiny_model_folder), data={"train": str(alpaca_file), "eval": 2}, precision="fp32", samples=1,
        training={"epochs": 1, "compile": False}, output=str(tmp_path / "run"),
    )  # fmt: skip


def test_everything_that_is_shown_is_kept_as_an_event(recipe: Recipe, tmp_path: Path) -> None:
    terminal, heard = io.StringIO(), list[Event]()
    fine_tune(recipe, console=Console(file=terminal, width=500), listeners=[heard.append])
    rows = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [row["event"] for row in rows] == [event.kind for event in heard]
    kinds = [type(event) for event in heard]
    assert kinds.index(Started) < kinds.index(Step) < kinds.index(Saved) < kinds.index(Done) == len(kinds) - 1
    titles = [event.title for event in heard if isinstance(event, Noted)]
    assert {"device", "model", "data", "precision", "memory", "LoRA", "layers", "saving"} <= set(titles)
    kept = " ".join(str(value) for row in rows for value in row.values())
    for line in terminal.getvalue().splitlines():
        if not line.startswith(("step ", "saved step ")):  # made of numbers
            assert line[10:].strip() in kept or line in kept, line


def test_a_run_keeps_its_plan_and_a_recipe_that_is_the_users(recipe: Recipe, tmp_path: Path) -> None:
    result = fine_tune(recipe.model_copy(update={"precision": "auto"}), console=Console(quiet=True))
    plan = Plan.from_json((tmp_path / "run" / "plan.json").read_text())
    assert plan.choice.precision != "auto" and plan.micro_batch_tokens > 0 and not plan.compiled
    assert plan.compilation == "as the recipe asks" and plan.memory.adapter > 0
    kept = result.run.recipe()
    assert (kept.precision, kept.training.micro_batch_tokens, kept.trainer) == ("auto", None, {})


def test_a_run_that_stops_early_says_so_as_an_event(recipe: Recipe, tmp_path: Path) -> None:
    recipe.training.max_minutes = 1e-6
    with pytest.raises(Interrupted) as error:
        fine_tune(recipe, console=Console(quiet=True))
    heard = list[Event]()
    last = json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[-1])
    assert last["event"] == Stopped.kind and last["reason"] == str(error.value)
    run = tmp_path / "run"
    text = (run / "recipe.yaml").read_text().replace("max_minutes: 1.0e-06", "max_minutes: null")
    (run / "recipe.yaml").write_text(text)
    resume(Run(run), console=Console(quiet=True), listeners=[heard.append])
    started = next(event for event in heard if isinstance(event, Started))
    assert started.step == 1 and isinstance(heard[-1], Done)
    rows = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [row["event"] for row in rows].count(Started.kind) == 2, "a resumed run goes on writing the same file"


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
