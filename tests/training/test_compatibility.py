"""What a run may be gone on with, who may, when it stops, and that it is asked for."""

import io
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

import huarizo.training.finetune
from huarizo.errors import HuarizoError, Interrupted, MachineError, UserError
from huarizo.recipe import Recipe, make_recipe, to_yaml
from huarizo.recipe_help import fields
from huarizo.runs import Run
from huarizo.training.checkpoint import Checkpoint
from huarizo.training.compatibility import compare, compared_compilation, facts_of
from huarizo.training.finetune import fine_tune, resume
from huarizo.training.interrupt import Signals
from huarizo.training.lock import STALE_AFTER, LockLostError, RunLock
from huarizo.training.saving import SaveAndStop
from huarizo.training.trainer import LoraTrainer


class Killed(BaseException):
    """Stands for a kill: nothing of ours catches it."""


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_folder: Path, alpaca_file: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return make_recipe(
        model=str(tiny_model_folder), data={"train": str(alpaca_file), "eval": 2}, precision="fp32", samples=1,
        lora={"dropout": 0.2}, training={"epochs": 2, "save_every": 2, "compile": False}, output=str(tmp_path / "run"),
    )  # fmt: skip


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=500)


def said(console: Console) -> str:
    file: Any = console.file
    return file.getvalue()


@pytest.fixture
def stopped(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """A run that was killed after its fifth step; four are saved."""
    end_of_step = SaveAndStop.on_step_end

    def killed(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise Killed
        end_of_step(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SaveAndStop, "on_step_end", killed)
        with pytest.raises(Killed):
            fine_tune(recipe, console=Console(quiet=True))
    assert recipe.output is not None
    yield Run(Path(recipe.output))


def edit(run: Run, key: str, value: Any) -> None:
    values = yaml.safe_load(run.recipe_file.read_text())
    section = values
    *parts, last = key.split(".")
    for part in parts:
        section = section[part]
    section[last] = value
    run.recipe_file.write_text(yaml.safe_dump(values))


@pytest.mark.parametrize(
    ("key", "value"),
    [("lora.r", 4), ("training.learning_rate", 1e-4), ("data.max_length", 40), ("data.prompt", "alpaca"),
     ("data.eval", 3)],
)  # fmt: skip
def test_what_would_be_another_run_is_refused(stopped: Run, key: str, value: Any) -> None:
    edit(stopped, key, value)
    with pytest.raises(UserError, match="can't be gone on with") as error:
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
"""Settings that the state of the checkpoint would override, or that only a run from its first step can have."""
USED = {
    "training.epochs": 3, "training.max_steps": 5, "training.eval_every": 3, "training.save_every": 1,
    "training.save_minutes": None, "training.keep": 1, "training.max_minutes": 30, "training.micro_batch_tokens": 64,
    "training.compile": True, "lora.dropout": 0.5, "trainer.max_grad_norm": 0.5, "trainer.logging_steps": 3,
    "trainer.gradient_checkpointing": True,
}  # fmt: skip


def test_every_setting_is_used_or_refused() -> None:
    """Whoever adds a setting says here what becomes of it when a run goes on."""
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

    now = facts_of(recipe, "data", "fp32", torch.device("cpu"))
    checkpoint = Checkpoint(Path("step-000004"), now, {"recipe.yaml": to_yaml(recipe).encode()})
    if key in REFUSED:
        with pytest.raises(UserError, match=rf"{re.escape(key)}[.\w]* was .* start a new"):
            compare(checkpoint, with_value(REFUSED[key]), now)
    else:
        compare(checkpoint, with_value(USED[key]), now)


def test_a_setting_that_is_not_refused_is_used_and_told(stopped: Run, console: Console) -> None:
    for key, value in {"lora.dropout": 0.0, "training.epochs": 3, "training.eval_every": 3}.items():
        edit(stopped, key, value)
    edit(stopped, "trainer", {"max_grad_norm": 1e-9, "logging_steps": 2})
    manifest = next(stopped.checkpoints.glob("step-*4/manifest.json"))
    assert json.loads(manifest.read_text())["versions"]["torch"]
    trainers: list[Any] = []
    begin = SaveAndStop.on_train_begin
    with pytest.MonkeyPatch.context() as patch:

        def seen(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainers.append((args, kwargs["model"]))
            begin(self, args, state, control, **kwargs)

        patch.setattr(SaveAndStop, "on_train_begin", seen)
        result = resume(stopped, console)
    assert "not bit-identical: lora.dropout was 0.2 and is 0.0; trainer.logging_steps was None" in said(console)
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
        edit(stopped, key, str(elsewhere / path.name))
    resume(stopped, console)
    assert "going on from step 4" in said(console) and "changed since" not in said(console)


def test_the_same_command_offers_to_go_on(stopped: Run, recipe: Recipe, console: Console) -> None:
    asked: list[Run] = []

    def no(run: Run) -> bool:
        asked.append(run)
        return False

    with pytest.raises(UserError, match="huarizo resume"):
        fine_tune(recipe, go_on=no)
    assert asked == [stopped]
    other = recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"r": 2})})
    with pytest.raises(UserError, match="huarizo resume"):
        fine_tune(other, go_on=no)
    assert len(asked) == 1, "another recipe is not offered"
    result = fine_tune(recipe, console=console, go_on=lambda run: True)
    assert "going on from step 4" in said(console) and result.run == stopped and stopped.is_complete()
    with pytest.raises(UserError, match="complete"):
        resume(stopped)


def test_a_second_process_is_refused(stopped: Run) -> None:
    with RunLock(stopped.path), pytest.raises(UserError, match=f"process {os.getpid()} on .*delete .*lock"):
        resume(stopped)
    assert not (stopped.path / ".lock").exists()


@pytest.mark.parametrize(
    ("host", "age", "flock", "kind", "refused"),
    [
        ("here", 0, True, "ext4", False),  # the kernel knows that its holder is dead
        ("here", 0, None, "nfs", True),  # no locks there, and the process lives
        ("elsewhere", 0, True, "ext4", False),  # nobody elsewhere writes to a local disk
        ("elsewhere", 0, True, "fuse.drive", True),
        ("elsewhere", STALE_AFTER + 60, True, "fuse.drive", False),
        ("elsewhere", STALE_AFTER + 60, None, "nfs", False),
        ("elsewhere", 5, None, "nfs", True),
    ],
)  # fmt: skip
def test_stale_locks_are_recognised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, age: int, flock: Any, kind: str, refused: bool
) -> None:
    import platform

    monkeypatch.setattr("huarizo.training.lock.file_system", lambda path: kind)
    if flock is None:
        monkeypatch.setattr("huarizo.training.lock.fcntl", None)
    note = {"pid": os.getpid(), "host": platform.node() if host == "here" else "other-machine"}
    (tmp_path / ".lock").write_text(json.dumps(note))
    os.utime(tmp_path / ".lock", (time.time() - age, time.time() - age))
    if refused:
        with pytest.raises(UserError, match="another process trains here"), RunLock(tmp_path):
            pass
        return
    with RunLock(tmp_path) as lock:
        lock.require_held()
        lock.require_folder()
        (tmp_path / ".lock").unlink()
        with pytest.raises(MachineError, match="no longer the folder"):
            lock.require_folder()


def test_a_lock_of_a_process_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import platform

    monkeypatch.setattr("huarizo.training.lock.fcntl", None)
    (tmp_path / ".lock").write_text(json.dumps({"pid": 2**22 + 1, "host": platform.node()}))
    with RunLock(tmp_path):
        pass
    (tmp_path / ".lock").write_text("not JSON")
    with RunLock(tmp_path):
        pass


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_are_noted_once_and_then_end_at_once(number: str) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals, signals.patience(None):
        os.kill(os.getpid(), getattr(signal, number))
        assert signals.received == number
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        signals.received = None
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_session_that_ends_is_left_in_time(recipe: Recipe, console: Console) -> None:
    recipe.training.max_minutes = 1e-6
    with pytest.raises(Interrupted, match=r"at training.max_minutes=1e-06 after step 1 of 6, which is saved.*resume"):
        fine_tune(recipe, console=console)
    assert recipe.output is not None
    edit(Run(Path(recipe.output)), "training.max_minutes", None)
    resume(Run(Path(recipe.output)), console)
    assert "going on from step 1" in said(console) and "changed since" not in said(console)


def test_checkpoints_come_by_time_but_cost_no_more_than_a_hundredth(
    recipe: Recipe, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe.training.save_every, recipe.training.save_minutes = None, 1e-6
    fine_tune(recipe, console=console)
    assert said(console).count("saved step") < 6, "after a checkpoint there is a hundred times its cost without one"
    assert "saved step 1\n" in said(console) and "saved step 6\n" in said(console)


def test_data_that_changes_during_the_run_is_told(
    recipe: Recipe, console: Console, alpaca_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = huarizo.training.finetune.load_model

    def changing(prepared: Any) -> Any:
        alpaca_file.write_text("[]")
        return load(prepared)

    monkeypatch.setattr(huarizo.training.finetune, "load_model", changing)
    fine_tune(recipe, console=console)
    assert f"{alpaca_file} changed during the run" in said(console)


def test_data_that_changes_while_it_is_read_is_refused(recipe: Recipe, alpaca_file: Path, monkeypatch: Any) -> None:
    import huarizo.training.prepare

    read = huarizo.training.prepare.prepare_data

    def changing(*arguments: Any) -> Any:
        data = read(*arguments)
        alpaca_file.write_text("[]")
        return data

    monkeypatch.setattr(huarizo.training.prepare, "prepare_data", changing)
    with pytest.raises(HuarizoError, match="changed while it was read"):
        fine_tune(recipe)


def test_no_space_is_said_before_the_start(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huarizo.training.finetune, "space_needed", lambda trainable, keep: 10**18)
    with pytest.raises(MachineError, match="are needed for checkpoints and adapter"):
        fine_tune(recipe)


def test_checkpoints_that_are_a_link_are_refused(stopped: Run, tmp_path: Path) -> None:
    stopped.checkpoints.rename(tmp_path / "elsewhere")
    stopped.checkpoints.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / ".mine.0123abcd.tmp").write_text("precious")
    with pytest.raises(UserError, match=r"checkpoints: is a link"):
        resume(stopped, Console(quiet=True))
    assert (tmp_path / "elsewhere" / ".mine.0123abcd.tmp").read_text() == "precious"


OTHER = {"pid": 77, "host": "other-machine", "token": "another"}


def wait_until(true: Any) -> None:
    """Give a thread the time that it needs on a busy machine."""
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_lock_is_renewed_however_long_a_step_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huarizo.training.lock.RENEW_EVERY", 0.01)
    with RunLock(tmp_path):
        os.utime(tmp_path / ".lock", (1, 1))
        wait_until(lambda: (tmp_path / ".lock").stat().st_mtime > 1)
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("how", ["written over", "replaced"])
def test_who_has_lost_the_lock_learns_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr("huarizo.training.lock.RENEW_EVERY", 0.01)
    with RunLock(tmp_path) as lock:
        if how == "replaced":
            (tmp_path / ".lock").unlink()
        (tmp_path / ".lock").write_text(json.dumps(OTHER))
        wait_until(lambda: lock._lost)
        for check in (lock.require_held, lock.require_folder):
            with pytest.raises(LockLostError, match="process 77 on other-machine has taken this run over"):
                check()
    assert json.loads((tmp_path / ".lock").read_text()) == OTHER, "the other's lock stays"


def test_a_run_that_was_taken_over_stops_and_writes_no_more(
    recipe: Recipe, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert recipe.output is not None
    run, begin = Run(Path(recipe.output)), SaveAndStop.on_step_begin

    def taken_over(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            (run.path / ".lock").write_text(json.dumps(OTHER))
        begin(self, args, state, control, **kwargs)

    monkeypatch.setattr(SaveAndStop, "on_step_begin", taken_over)
    with pytest.raises(LockLostError, match="writes no more"):
        fine_tune(recipe, console=console)
    assert [folder.name for folder in run.checkpoints.iterdir()] == ["step-000002"]
    assert "Going on" not in said(console) and not run.adapter.exists()
    assert json.loads((run.path / ".lock").read_text()) == OTHER


def test_other_kernels_instructions_and_compilation_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(model="model", data={"train": "rows.json"})
    states: list[dict[str, Any]] = []
    for flags, there in ((frozenset({"avx2", "avx512f", "sse"}), ("attention", "dropout")), (frozenset({"avx2"}), ())):
        monkeypatch.setattr("huarizo.training.compatibility.cpu_flags", lambda flags=flags: flags)
        monkeypatch.setattr(
            "huarizo.training.compatibility.load_kernel",
            lambda name, there=there: object() if name in there else "no compiler",
        )
        states.append(facts_of(recipe, "data", "fp32", torch.device("cpu")) | {"compiled": not states})
    then, now = states
    checkpoint = Checkpoint(Path("step-000004"), then, {"recipe.yaml": to_yaml(recipe).encode()})
    assert compare(checkpoint, recipe, then) == []
    assert compare(checkpoint, recipe, now) == [
        "instructions: avx2 avx512f then, avx2 now", "kernels: attention dropout then, none now",
    ]  # fmt: skip
    assert compared_compilation(checkpoint, None) is None
    told = compared_compilation(checkpoint, "no compiler")
    assert told == "layers: compiled then, not now: no compiler"
    checkpoint = Checkpoint(checkpoint.path, now, checkpoint.files)
    assert compared_compilation(checkpoint, None) == "layers: not compiled then, compiled now"


@pytest.mark.parametrize(("planned_now", "used"), [(None, 64), (128, 128)])
def test_micro_batches_that_memory_made_smaller_stay_so(
    recipe: Recipe, console: Console, planned_now: int | None, used: int
) -> None:
    assert recipe.output is not None
    run, budgets = Run(Path(recipe.output)), []
    recipe.training.micro_batch_tokens, recipe.training.max_minutes = 256, 1e-6
    accumulate = LoraTrainer._accumulate

    def no_memory(self: Any, model: Any, step: Any) -> Any:
        budgets.append(self.budget)
        if self.budget > 64:
            raise MemoryError
        return accumulate(self, model, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoraTrainer, "_accumulate", no_memory)
        with pytest.raises(Interrupted):
            fine_tune(recipe, console=console)
    assert budgets[0] == 256 and budgets[-1] == 64
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            LoraTrainer, "_accumulate", lambda self, *step: budgets.append(self.budget) or accumulate(self, *step)
        )
        edit(run, "training.max_minutes", None)
        if planned_now:
            edit(run, "training.micro_batch_tokens", planned_now)
        resume(run, console)
    assert budgets[-1] == used
