"""Values that are not finite never reach the weights; a run that diverges ends with the reason."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from huarizo.data.packing import PackedBatch
from huarizo.recipe import make_recipe
from huarizo.results.report import heldout_change
from huarizo.training.checkpoint import Trained, contents, newest_first, newest_valid, save
from huarizo.training.divergence import (
    CLIMB,
    MAX_SKIPPED,
    MAX_SKIPPED_SCALED,
    WINDOW,
    DivergedError,
    LossWatch,
    likely_cause,
)
from huarizo.training.trainer import LoraTrainer
from tests.training.make import lora_model, make_trainer, random_examples
from tests.training.test_checkpoint import weights


def trainer_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: dict[int, str], steps: int = 8, save_every: int | None = 1,
    **arguments: Any,
) -> LoraTrainer:  # fmt: skip
    """A trainer whose loss or gradients are not finite in some steps."""
    training = {"epochs": 20, "save_every": save_every, "keep": 99, "max_steps": steps}
    recipe = make_recipe(trainer=arguments, training=training)
    trainer = make_trainer(lora_model(recipe), recipe, random_examples([20, 30, 40, 50] * 4), tmp_path)
    plain = trainer.losses

    def loss_of(model: Any, batch: PackedBatch) -> torch.Tensor:
        loss, kind = plain(model, batch), bad.get(trainer.state.global_step + 1)
        if kind == "gradient":
            loss.register_hook(lambda gradient: gradient * math.nan)
        return loss * math.inf if kind == "loss" else loss

    losses: Any = loss_of
    losses.within = plain.within
    monkeypatch.setattr(trainer, "losses", losses)
    return trainer


def with_scaler(trainer: LoraTrainer, monkeypatch: pytest.MonkeyPatch) -> torch.amp.GradScaler:
    """Gives a trainer the loss scaler that Accelerate makes for fp16 on a card, here on the CPU."""
    scaler: Any = torch.amp.GradScaler("cpu")
    accelerator: Any = trainer.accelerator
    monkeypatch.setattr(accelerator, "scaler", scaler)
    monkeypatch.setattr(accelerator, "unscale_gradients", lambda: scaler.unscale_(accelerator._optimizers[0].optimizer))
    return scaler


OPTIMIZERS = pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
CLIPPING = pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
KINDS = pytest.mark.parametrize("kind", ["loss", "gradient"])


@OPTIMIZERS
@CLIPPING
@KINDS
def test_with_a_loss_scaler_a_step_is_left_out_and_the_scale_lowered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, max_grad_norm: float, optim: str
) -> None:
    trainer = trainer_with(tmp_path, monkeypatch, {3: kind}, 4, optim=optim, max_grad_norm=max_grad_norm)
    scaler = with_scaler(trainer, monkeypatch)
    before = scaler.get_scale()
    trainer.train_from(None)
    assert trainer.watch.skipped == 1 and scaler.get_scale() == before / 2
    folder = tmp_path / "run" / "checkpoints"
    after = [(folder / f"step-00000{step}" / "adapter_model.safetensors").read_bytes() for step in (2, 3, 4)]
    assert after[0] == after[1] != after[2]


@pytest.mark.parametrize("scaled", [False, True])
@OPTIMIZERS
@KINDS
def test_a_run_that_ends_in_skipped_steps_has_not_ended_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, optim: str, scaled: bool
) -> None:
    trainer = trainer_with(tmp_path, monkeypatch, dict.fromkeys(range(3, 10), kind), 9, None, optim=optim)
    if scaled:
        with_scaler(trainer, monkeypatch)
    with pytest.raises(DivergedError, match="stopped at step .: loss or gradients were not finite in . steps in a row"):
        trainer.train_from(None)
    assert all(tensor.isfinite().all() for tensor in weights(trainer).values())


def test_a_scale_is_sought_for_so_many_steps_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_with(tmp_path, monkeypatch, dict.fromkeys(range(1, 50), "gradient"), 50, None)
    with_scaler(trainer, monkeypatch)
    with pytest.raises(DivergedError, match=f"stopped at step {MAX_SKIPPED_SCALED}: "):
        trainer.train_from(None)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_short_run_in_which_no_step_went_right_is_no_result(
    steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_with(tmp_path, monkeypatch, dict.fromkeys(range(1, steps + 1), "gradient"), steps, None)
    with pytest.raises(DivergedError, match=f"not finite in {steps} steps in a row. No step was finite"):
        trainer.train_from(None)


@KINDS
def test_a_step_that_is_not_finite_is_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    trainer = trainer_with(tmp_path, monkeypatch, {3: kind, 6: kind})
    trainer.train_from(None)
    assert trainer.state.global_step == 8 and trainer.watch.skipped == 2
    assert all(tensor.isfinite().all() for tensor in weights(trainer).values())
    files = {int(path.name[5:11]): path for path in (tmp_path / "run" / "checkpoints").iterdir()}
    parts = ("adapter_model.safetensors", "optimizer.safetensors")
    for step in (3, 6):
        for part in parts:
            assert (files[step] / part).read_bytes() == (files[step - 1] / part).read_bytes()
    assert (files[4] / parts[0]).read_bytes() != (files[3] / parts[0]).read_bytes()
    rows = (tmp_path / "metrics.jsonl").read_text()
    assert rows.count('"skipped_steps": 2') == 3 and "NaN" not in rows and "Infinity" not in rows


def test_repeated_skips_end_the_run_with_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_with(tmp_path, monkeypatch, dict.fromkeys(range(3, 9), "gradient"))
    with pytest.raises(
        DivergedError, match=r"not finite in 5 steps in a row\. The learning rate is probably too high"
    ) as error:
        trainer.train_from(None)
    assert "step-000006" in str(error.value) and error.value.exit_code == 2
    checkpoint, _ = newest_valid(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 6


def test_a_model_that_never_goes_right_is_the_likely_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_with(tmp_path, monkeypatch, dict.fromkeys(range(1, 9), "loss"))
    with pytest.raises(DivergedError, match="base model's weights are probably damaged"):
        trainer.train_from(None)


def test_a_climbing_loss_is_noticed_and_noise_is_not() -> None:
    watch, generator = LossWatch(), torch.Generator().manual_seed(0)
    for step in range(1, 1000):
        noise = float(torch.randn((), generator=generator))
        assert watch.add(step, 2.0 + 0.7 * noise, skipped=False) is None
    wrong = [watch.add(step, 2.0 + 0.2 * (step - 999), skipped=False) for step in range(1000, 1100)]
    told = next(text for text in wrong if text)
    assert told.startswith("the loss climbed from ") and watch.lowest_step < 1000
    first = next(step for step, text in enumerate(wrong) if text)
    assert first < WINDOW + CLIMB / 0.2 + 5


def test_the_watch_goes_on_from_a_checkpoint() -> None:
    watch = LossWatch()
    assert LossWatch.from_state(watch.state()) == watch
    for step in range(1, 30):
        watch.add(step, float(step % 7), skipped=step % 11 == 0)
    assert LossWatch.from_state(watch.state()) == watch
    assert math.isfinite(watch.lowest)


def test_loss_scaling_may_skip_at_first() -> None:
    watch = LossWatch()
    assert all(watch.add(step, 1.0, skipped=True, scaled=True) is None for step in range(1, MAX_SKIPPED + 10))
    assert "overflow fp16" in likely_cause(watch, 2e-4, "fp16", 100)


def test_the_loss_scale_is_part_of_a_checkpoint(tmp_path: Path) -> None:
    recipe = make_recipe(training={"save_every": 1, "max_steps": 1})
    trainer = make_trainer(lora_model(recipe), recipe, random_examples([20, 30]), tmp_path / "a")
    trainer.train_from(None)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    scaler.scale(torch.ones(()))
    scaler.update(4.0)
    trained = Trained(trainer.model, trainer.optimizer, trainer.lr_scheduler, scaler)
    save(tmp_path, 1, contents(trained, [torch.get_rng_state()], {}), {}, keep=1)
    checkpoint, _ = newest_valid(tmp_path)
    fresh = torch.amp.GradScaler("cpu", init_scale=65536.0)
    assert checkpoint is not None
    checkpoint.restore_optimizer(Trained(trainer.model, trainer.optimizer, trainer.lr_scheduler, fresh))
    assert fresh.state_dict() == scaler.state_dict() and fresh.get_scale() == 4.0


def test_lora_is_fp32_under_an_fp16_base() -> None:
    from huarizo.model.lora import add_lora
    from tests.tiny import make_model

    recipe = make_recipe()
    model = add_lora(make_model().half().requires_grad_(False), recipe.lora, 0)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
def test_a_held_out_loss_that_is_no_number_is_never_the_best(tmp_path: Path, monkeypatch: Any, bad: float) -> None:
    heldout = iter([bad, 3.0, bad, 2.0, bad, 2.5, bad, bad])
    recipe = make_recipe(training={"max_steps": 8, "eval_every": 1, "keep": 1, "save_every": 99, "save_minutes": None})
    trainer = make_trainer(lora_model(recipe), recipe, random_examples([20] * 16), tmp_path)
    trainer.eval_dataset = trainer.train_dataset
    monkeypatch.setattr(trainer, "_heldout_sums", lambda rows: torch.tensor([next(heldout), 1.0]))
    trainer.train_from(None)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [row["eval_loss"] for row in rows if "eval_loss" in row] == [None, 3, None, 2, None, 2.5, None, None]
    assert [folder.name for folder in newest_first(tmp_path / "run" / "checkpoints")] == ["step-000008", "step-000004"]
    assert heldout_change(rows) is None, "none was measured after the last step"


def test_a_checkpoint_whose_loss_is_no_number_is_not_kept_as_the_best(tmp_path: Path) -> None:
    for step, loss in enumerate([math.nan, 2.0, math.nan, 3.0, "1.0", 4.0], start=1):
        save(tmp_path, step, {"a": b"a"}, {"heldout_loss": loss}, keep=1)
    assert [folder.name for folder in newest_first(tmp_path)] == ["step-000006", "step-000002"]
