"""A checkpoint is complete or absent, holds no pickle, and a run resumed from it ends the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from huarizo.errors import UserError
from huarizo.recipe import make_recipe
from huarizo.training.checkpoint import (
    Checkpoint,
    Trained,
    contents,
    fault_of,
    newest_first,
    newest_valid,
    save,
)
from tests.training.make import lora_model, make_trainer, random_examples

FILES = {"adapter_model.safetensors": b"a", "state.json": b"{}"}


def train(tmp_path: Path, stop_at: int = 8, checkpoint: Checkpoint | None = None, **training: Any) -> Any:
    recipe = make_recipe(
        lora={"dropout": 0.1},
        training={"epochs": 2, "save_every": 3, "keep": 9, **training},
        trainer={"lr_scheduler_type": "cosine"},
    )
    torch.manual_seed(0)
    examples = random_examples([20, 30, 40, 50] * 4)
    rows = checkpoint.metrics if checkpoint else None
    trainer = make_trainer(lora_model(recipe), recipe, examples, tmp_path, rows_so_far=rows)
    if stop_at < 8:
        from transformers import TrainerCallback

        class Stop(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                control.should_training_stop = state.global_step >= stop_at

        trainer.add_callback(Stop())
    trainer.train_from(checkpoint)
    return trainer


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def metrics(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in ("step", "loss", "lr", "grad_norm", "tokens")} for row in rows]


@pytest.mark.parametrize("stop_at", [3, 4, 5, 7])
def test_a_run_that_goes_on_from_a_checkpoint_ends_bit_identical(tmp_path: Path, stop_at: int) -> None:
    whole = train(tmp_path / "whole")
    train(tmp_path / "stopped", stop_at)
    checkpoint, damaged = newest_valid(tmp_path / "stopped" / "run" / "checkpoints")
    assert checkpoint is not None and checkpoint.step == stop_at // 3 * 3 and not damaged
    resumed = train(tmp_path / "stopped", checkpoint=checkpoint)
    assert resumed.state.global_step == whole.state.global_step == 8
    assert resumed.state.num_input_tokens_seen == whole.state.num_input_tokens_seen
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(resumed).items())
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
    assert resumed.watch == whole.watch


def test_a_run_that_was_killed_after_its_last_step_trains_no_further(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", max_steps=6)
    checkpoint, _ = newest_valid(tmp_path / "whole" / "run" / "checkpoints")
    resumed = train(tmp_path / "again", checkpoint=checkpoint, max_steps=6)
    assert resumed.state.global_step == whole.state.global_step == 6
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(resumed).items())


def test_a_checkpoint_is_written_at_the_end_and_holds_no_pickle(tmp_path: Path) -> None:
    train(tmp_path)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [f.name for f in newest_first(checkpoints)] == ["step-000008", "step-000006", "step-000003"]
    assert {file.suffix for file in checkpoints.rglob("*.*")} == {".safetensors", ".json", ".jsonl", ".yaml"}


def test_damaged_checkpoints_are_named_and_set_aside(tmp_path: Path) -> None:
    for step in (3, 6, 8):
        save(tmp_path, step, FILES, {}, keep=9)
    newest = tmp_path / "step-000008"
    (newest / "adapter_model.safetensors").write_bytes(b"b")
    assert fault_of(newest) == "adapter_model.safetensors is not as it was written"
    (tmp_path / "step-000006" / "state.json").unlink()
    checkpoint, damaged = newest_valid(tmp_path)
    assert checkpoint is not None and checkpoint.step == 3 and checkpoint.files == FILES
    assert damaged == [
        "step-000008: adapter_model.safetensors is not as it was written", "step-000006: state.json is missing",
    ]  # fmt: skip
    assert {p.name for p in tmp_path.iterdir()} == {"step-000003", "damaged-step-000006", "damaged-step-000008"}
    assert newest_valid(tmp_path)[1] == []
    assert save(tmp_path, 6, FILES, {}, keep=9).name == "step-000006-2", "a name is used once"
    assert save(tmp_path, 6, FILES, {}, keep=9).name == "step-000006-3"
    assert newest_first(tmp_path)[0].name == "step-000006-3"


@pytest.mark.parametrize("change", [("step", 5), ("base", "other"), ("files", {}), ("sha256", "0")])
def test_a_changed_manifest_is_damage(tmp_path: Path, change: tuple[str, Any]) -> None:
    manifest = save(tmp_path, 4, FILES, {"base": "one"}, keep=9) / "manifest.json"
    assert fault_of(manifest.parent) is None
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | dict([change])))
    assert fault_of(manifest.parent) == "its manifest is not as it was written"
    manifest.write_text("[]")
    assert fault_of(manifest.parent) == "its manifest can't be read"
    manifest.unlink()
    assert fault_of(manifest.parent) == "manifest.json is missing"


def test_a_checkpoint_under_another_name_is_not_taken(tmp_path: Path) -> None:
    save(tmp_path, 4, FILES, {}, keep=9).rename(tmp_path / "step-000400")
    assert newest_valid(tmp_path) == (None, ["step-000400: its manifest belongs to step 4"])


def test_older_ones_are_deleted_by_step_but_not_the_best(tmp_path: Path) -> None:
    import os

    losses = {10: (2.0, 3.0), 20: (1.5, 2.9), 30: (1.8, 2.5), 40: (1.9, 2.7), 50: (None, 2.8), 60: (None, 2.9)}
    for step, (heldout, running) in losses.items():
        save(tmp_path, step, FILES, {"heldout_loss": heldout, "running_loss": running}, keep=2)
        os.utime(tmp_path / f"step-{step:06d}", (1e9 - step, 1e9 - step))  # a clock that runs backwards
    assert [f.name for f in newest_first(tmp_path)] == ["step-000060", "step-000050", "step-000030", "step-000020"]
    assert len(list(tmp_path.iterdir())) == 4


def test_a_checkpoint_of_another_lora_is_refused(tmp_path: Path) -> None:
    train(tmp_path)
    checkpoint, _ = newest_valid(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    with pytest.raises(UserError, match="checkpoint's LoRA is not the recipe's"):
        checkpoint.restore_weights(lora_model(make_recipe(lora={"r": 4})))


@pytest.mark.parametrize(("then", "now"), [(2, 1), (1, 2), (2, 2)])
def test_generators_of_cards_go_to_as_many_as_there_are(
    then: int, now: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(training={"max_steps": 1})
    trainer = make_trainer(lora_model(recipe), recipe, random_examples([20, 30]), tmp_path)
    trainer.create_optimizer_and_scheduler(1)
    trained = Trained(trainer.model, trainer.optimizer, trainer.lr_scheduler, None)
    cards = [torch.full((16,), number, dtype=torch.uint8) for number in range(then)]
    files = contents(trained, [torch.cat([torch.get_rng_state(), *cards])], {})
    put: dict[int, int] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: now)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.zeros(16, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, number: put.update({number: int(state[0])}))
    Checkpoint(tmp_path, {"step": 1}, files).restore_generators(rank=5)
    assert put == {number: number for number in range(min(then, now))}
