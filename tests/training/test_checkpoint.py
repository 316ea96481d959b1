"""A checkpoint is complete or absent, holds no pickle, and a run that goes on from it ends the same."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from huarizo.errors import UserError
from huarizo.recipe import make_recipe
from huarizo.training.checkpoint import fault_of, load_weights, newest_valid
from tests.training.test_parity import lora_model, make_trainer, random_examples


def train(tmp_path: Path, max_steps: int, checkpoint: Path | None = None, **training: Any) -> Any:
    recipe = make_recipe(
        lora={"dropout": 0.1},
        training={"epochs": 2, "save_every": 3, **training},
        trainer={"lr_scheduler_type": "cosine"},
    )
    torch.manual_seed(0)
    trainer = make_trainer(lora_model(recipe), recipe, random_examples([20, 30, 40, 50] * 4), tmp_path)
    if max_steps < 8:
        from transformers import TrainerCallback

        class Stop(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                control.should_training_stop = state.global_step >= max_steps

        trainer.add_callback(Stop())
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_a_run_that_goes_on_from_a_checkpoint_ends_bit_identical(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", max_steps=8)
    train(tmp_path / "stopped", max_steps=4)
    folder, damaged = newest_valid(tmp_path / "stopped" / "run" / "checkpoints")
    assert folder is not None and folder.name == "step-000003" and not damaged
    resumed = train(tmp_path / "stopped", max_steps=8, checkpoint=folder)
    assert resumed.state.global_step == whole.state.global_step == 8
    assert resumed.state.num_input_tokens_seen == whole.state.num_input_tokens_seen
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(resumed).items())
    losses = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (whole, resumed)]
    assert losses[0] == losses[1]


def test_damaged_checkpoints_are_passed_over(tmp_path: Path) -> None:
    checkpoints = train(tmp_path, max_steps=8).run.checkpoints
    assert [folder.name for folder in sorted(checkpoints.iterdir())] == ["step-000003", "step-000006", "step-000008"]
    assert not [file.name for file in checkpoints.rglob("*") if file.suffix in (".bin", ".pt", ".pth", ".pkl")]
    newest = checkpoints / "step-000008"
    optimizer = newest / "optimizer.safetensors"
    optimizer.write_bytes(optimizer.read_bytes()[:-1] + b"\xff")
    assert fault_of(newest) == "optimizer.safetensors is not as it was written"
    folder, damaged = newest_valid(checkpoints)
    assert folder == checkpoints / "step-000006" and len(damaged) == 1
    shutil.rmtree(checkpoints / "step-000003")
    (folder / "state.json").unlink()
    shutil.copytree(folder, checkpoints / "step-000009")
    (checkpoints / "step-000009" / "manifest.json").write_text("{}")
    folder, damaged = newest_valid(checkpoints)
    assert folder is None and len(damaged) == 3


def test_a_checkpoint_of_another_lora_is_refused(tmp_path: Path) -> None:
    folder, _ = newest_valid(train(tmp_path, max_steps=8).run.checkpoints)
    assert folder is not None
    with pytest.raises(UserError, match="another LoRA"):
        load_weights(folder, lora_model(make_recipe(lora={"r": 4})))
