"""What may change before a run is resumed, and what is refused or reported."""

import ctypes
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from huarizo.errors import UserError
from huarizo.kernels.build import Library
from huarizo.kernels.tiers import TIERS
from huarizo.plan import Choice, Memory, Plan
from huarizo.recipe import Recipe, make_recipe, to_yaml
from huarizo.recipe_help import fields
from huarizo.runs import Run
from huarizo.training.checkpoint import Checkpoint
from huarizo.training.compatibility import EFFECTS, changes_since, effect_of, facts_of
from huarizo.training.finetune import resume
from huarizo.training.loop import Loop
from tests.cpus import VNNI, pretend
from tests.training.make import edit_recipe, printed

PLAN = Plan(
    device="cpu: test", world_size=1, choice=Choice("fp32", "", torch.float32), micro_batch_tokens=64,
    activation_checkpointing=False, spread=False, compiled=True, compilation="",
    memory=Memory(weights=0, adapter=0, activations=0, available=0),
)  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [("lora.r", 4), ("training.learning_rate", 1e-4), ("data.max_length", 40), ("data.prompt", "alpaca"),
     ("data.eval", 3)],
)  # fmt: skip
def test_what_would_be_another_run_is_refused(stopped: Run, key: str, value: Any) -> None:
    edit_recipe(stopped, key, value)
    with pytest.raises(UserError, match="can't be resumed") as error:
        resume(stopped, Console(quiet=True))
    assert key in str(error.value) or "the rows" in str(error.value)
    assert "start a new run" in str(error.value)


@pytest.mark.parametrize("change", ["data", "model"])
def test_other_files_are_refused(stopped: Run, change: str, alpaca_file: Path, tiny_model_folder: Path) -> None:
    if change == "data":
        alpaca_file.write_text(json.dumps(json.loads(alpaca_file.read_text())[::-1]))
    else:
        from tests.tiny import make_model

        make_model(seed=5).save_pretrained(tiny_model_folder)
    with pytest.raises(UserError, match="sha256 differs"):
        resume(stopped, Console(quiet=True))


REFUSED = {
    "training.learning_rate": 1e-4, "training.batch_size": 2, "training.seed": 7, "lora.r": 4, "lora.alpha": 32,
    "lora.target_modules": ["q_proj"], "lora.loraplus_lr_ratio": 4.0, "lora.options": {"use_rslora": True},
    "trainer.weight_decay": 0.1, "trainer.adam_beta1": 0.5, "trainer.adam_beta2": 0.5, "trainer.adam_epsilon": 1e-3,
    "trainer.optim": "sgd", "trainer.optim_args": "momentum=0.9", "trainer.lr_scheduler_type": "cosine",
    "trainer.lr_scheduler_kwargs": {"num_cycles": 2}, "trainer.warmup_steps": 3, "trainer.neftune_noise_alpha": 5,
}  # fmt: skip
"""Settings that the checkpoint would override, or that must not change after the first step."""
USED = {
    "training.epochs": 3, "training.max_steps": 5, "training.eval_every": 3, "training.save_every": 1,
    "training.save_minutes": None, "training.keep": 1, "training.max_minutes": 30, "training.micro_batch_tokens": 64,
    "training.compile": True, "lora.dropout": 0.5, "trainer.max_grad_norm": 0.5, "trainer.logging_steps": 3,
    "trainer.gradient_checkpointing": True,
}  # fmt: skip


def test_every_setting_is_used_or_refused() -> None:
    """A new setting must be listed with its effect on a resumed run."""
    known = {key for key, _ in fields(Recipe) if key.startswith(("training.", "lora."))}
    assert known <= REFUSED.keys() | USED.keys(), known - REFUSED.keys() - USED.keys()


@pytest.mark.parametrize("key", [*REFUSED, *USED])
def test_a_changed_setting_is_refused_unless_it_is_used(key: str) -> None:
    recipe = make_recipe(model="model", data={"train": "rows.json"}, training={"eval_every": 2}, lora={"dropout": 0.2})

    def with_value(value: Any) -> Recipe:
        section, name = key.split(".", 1)
        values = recipe.model_dump()
        values[section][name] = value
        return make_recipe(**values)

    now = facts_of(recipe, "data", PLAN, torch.device("cpu"))
    checkpoint = Checkpoint(Path("step-000004"), now, {"recipe.yaml": to_yaml(recipe).encode()})
    if key in REFUSED:
        with pytest.raises(UserError, match=rf"{re.escape(key)}[.\w]* was .* start a new"):
            changes_since(checkpoint, with_value(REFUSED[key]), now)
    else:
        changes_since(checkpoint, with_value(USED[key]), now)


def test_a_setting_that_is_not_refused_is_used_and_reported(stopped: Run, console: Console) -> None:
    for key, value in {"lora.dropout": 0.0, "training.epochs": 3, "training.eval_every": 3}.items():
        edit_recipe(stopped, key, value)
    edit_recipe(stopped, "trainer", {"max_grad_norm": 1e-9, "logging_steps": 2})
    manifest = next(stopped.checkpoints.glob("step-*4/manifest.json"))
    assert json.loads(manifest.read_text())["versions"]["torch"]
    trainers: list[Any] = []
    begin = Loop.on_train_begin
    with pytest.MonkeyPatch.context() as patch:

        def seen(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainers.append((args, kwargs["model"]))
            begin(self, args, state, control, **kwargs)

        patch.setattr(Loop, "on_train_begin", seen)
        result = resume(stopped, console)
    assert "not bit-identical: lora.dropout was 0.2 and is 0.0; trainer.logging_steps was None" in printed(console)
    rows = result.metrics
    assert [row["step"] for row in rows if "eval_loss" in row][-2:] == [6, 9], "evaluated as the recipe says now"
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 6, 8], "and logged"
    ((args, model),) = trainers
    assert args.max_grad_norm == 1e-9
    assert not [m for m in model.modules() if getattr(m, "p", 0) == 0.2], "dropout is that of the recipe"


def test_a_moved_model_and_moved_data_are_the_same(
    stopped: Run, console: Console, alpaca_file: Path, tiny_model_folder: Path
) -> None:
    elsewhere = alpaca_file.parent / "elsewhere"
    elsewhere.mkdir()
    for key, path in {"data.train": alpaca_file, "model": tiny_model_folder}.items():
        path.rename(elsewhere / path.name)
        edit_recipe(stopped, key, str(elsewhere / path.name))
    resume(stopped, console)
    assert "resuming from step 4" in printed(console) and "changed since" not in printed(console)


def test_another_tier_is_reported_with_what_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(model="model", data={"train": "rows.json"})
    cpu, plan = torch.device("cpu"), replace(PLAN, choice=Choice("int8", "", torch.float32))
    pretend(monkeypatch, VNNI)
    then = facts_of(recipe, "data", plan, cpu)
    checkpoint = Checkpoint(Path("step-000004"), then, {"recipe.yaml": to_yaml(recipe).encode()})
    pretend(monkeypatch, VNNI, compiled_for="avx2")
    assert changes_since(checkpoint, recipe, facts_of(recipe, "data", plan, cpu)) == [
        "tier: avx512_vnni_bf16 then, avx2 now (products of int8 are the same; others may be rounded differently)"
    ]
    older = Checkpoint(checkpoint.path, {k: v for k, v in then.items() if k != "tier"}, checkpoint.files)
    assert changes_since(older, recipe, facts_of(recipe, "data", plan, cpu)) == []


def test_other_kernels_instructions_and_compilation_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(model="model", data={"train": "rows.json"})
    states: list[dict[str, Any]] = []
    for flags, there in ((frozenset({"avx2", "avx512f", "sse"}), ("attention", "dropout")), (frozenset({"avx2"}), ())):
        monkeypatch.setattr("huarizo.training.compatibility.cpu_flags", lambda flags=flags: flags)
        monkeypatch.setattr(
            "huarizo.kernels.build.load",
            lambda name, call, there=there: Library(ctypes.CDLL(None), TIERS[-1], True) if name in there else "no C",
        )
        plan = replace(PLAN, compiled=not states)
        states.append(facts_of(recipe, "data", plan, torch.device("cpu")))
    then, now = states
    checkpoint = Checkpoint(Path("step-000004"), then, {"recipe.yaml": to_yaml(recipe).encode()})
    assert changes_since(checkpoint, recipe, then) == []
    assert changes_since(checkpoint, recipe, now) == [
        "instructions: avx2 avx512f then, avx2 now", "kernels: attention dropout then, none now",
        f"tier: {TIERS[-1].name} then, none now (products of int8 are the same; others may be rounded differently)",
        "layers compiled: yes then, no now",
    ]  # fmt: skip
    checkpoint = Checkpoint(checkpoint.path, {k: v for k, v in now.items() if k != "compiled"}, checkpoint.files)
    assert changes_since(checkpoint, recipe, now) == [], "a checkpoint that does not say it"


def test_every_setting_has_an_effect_on_a_run_that_is_resumed() -> None:
    known = {key for key, _ in fields(Recipe)}
    assert all(effect_of(key) for key in known)
    sections = {key.partition(".")[0] for key in known}
    assert {key for key in EFFECTS if not key.startswith("trainer.")} <= known | sections
