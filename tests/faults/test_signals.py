"""A signal ends a run within seconds wherever it is, says what is kept, and the run can be gone on with."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import huarizo.finetune
from huarizo.training.trainer import LoraTrainer
from tests.faults.children import Lab, check_outcome, ended, finish, make_lab, start


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return make_lab(tmp_path_factory.mktemp("signals") / "lab")


def never_ending(owner: Any, name: str, call: int, here: Path) -> Callable[..., Any]:
    """The function of this name, which in its n-th call writes a file and then takes a minute."""
    plain, calls = getattr(owner, name), []

    def slow(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            here.touch()
            for _ in range(600):
                time.sleep(0.1)
        return plain(*args, **kwargs)

    return slow


@pytest.mark.parametrize(
    ("owner", "name", "call", "kept"),
    [
        (huarizo.finetune, "prepare", 1, "nothing was trained"),
        (huarizo.finetune, "load_model", 1, "no step was trained. Go on with"),
        (huarizo.finetune, "answers", 1, "no step was trained. Go on with"),
        (LoraTrainer, "_heldout_sums", 1, "no step was trained. Go on with"),
        (LoraTrainer, "_accumulate", 1, "no step was trained. Go on with"),  # as long as compilation
        (LoraTrainer, "_accumulate", 6, "after step 5 of 10, which is saved"),
        (LoraTrainer, "_heldout_sums", 2, "after step 4 of 10, which is saved"),
        (LoraTrainer, "_heldout_sums", 4, "after step 10 of 10, which is saved"),
        (huarizo.finetune, "answers", 2, "step 10 is saved"),
    ],
)
def test_a_signal_ends_whatever_goes_on(
    lab: Lab, capfd: Any, tmp_path: Path, owner: Any, name: str, call: int, kept: str
) -> None:
    run, here = tmp_path / "case", tmp_path / "here"
    with pytest.MonkeyPatch.context() as patch, capfd.disabled():
        patch.setattr("huarizo.training.trainer.GRACE", 0.2)
        patch.setattr(owner, name, never_ending(owner, name, call, here))
        pid = start(run, lab.folder / "recipe.yaml")
    while not here.exists():
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), (run / "log").read_text()
        time.sleep(0.01)
    os.kill(pid, signal.SIGTERM)
    assert ended(pid) == 130, "it was waited for to the end"
    log = (run / "log").read_text()
    assert "stopped by SIGTERM" in log and kept in log and "Traceback" not in log, log
    assert not (run / "run" / ".lock").exists()
    if "step" in kept and call > 1:
        with capfd.disabled():
            assert finish(lab, run) == 0, (run / "log").read_text()
        check_outcome(lab, run)
