"""SIGTERM wherever a run is: it ends within seconds, says what is kept, and the run can be resumed.

Each case has one function take a minute in one of its calls, as a large model does, and sends the signal there.
"""

import functools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huarizo.training.finetune
import huarizo.training.session
from huarizo.training.trainer import LoraTrainer
from tests.faults.children import Lab, check_outcome, ended, finish, start

PLACES = [
    (huarizo.training.finetune, "prepare", 1, "nothing was trained"),
    (huarizo.training.session, "load_model", 1, "no step was trained. Resume with"),
    (huarizo.training.session, "answers", 1, "no step was trained. Resume with"),
    (LoraTrainer, "_heldout_sums", 1, "no step was trained. Resume with"),
    (LoraTrainer, "_accumulate", 1, "no step was trained. Resume with"),  # as long as compilation
    (LoraTrainer, "_accumulate", 6, "after step 5 of 10, which is saved"),
    (LoraTrainer, "_heldout_sums", 2, "after step 4 of 10, which is saved"),
    (LoraTrainer, "_heldout_sums", 4, "after step 10 of 10, which is saved"),
    (huarizo.training.session, "answers", 2, "step 10 is saved"),
]
"""Whose function, its name, in which call, and what has to be said."""


def slow(plain: Callable[..., Any], call: int, here: Path) -> Callable[..., Any]:
    """The function, which in its n-th call says where it is and then takes a minute."""
    calls: list[int] = []

    @functools.wraps(plain)
    def slowly(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            here.touch()
            for _ in range(600):
                time.sleep(0.1)
        return plain(*args, **kwargs)

    return slowly


def interrupt(lab: Lab, run: Path, owner: Any, name: str, call: int, kept: str) -> None:
    """One case."""
    run.mkdir()
    plain, here = getattr(owner, name), run / "here"
    setattr(owner, name, slow(plain, call, here))
    try:
        pid = start(run, lab.folder / "recipe.yaml")
    finally:
        setattr(owner, name, plain)
    while not here.exists():
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), (run / "log").read_text()
        time.sleep(0.01)
    os.kill(pid, signal.SIGTERM)
    assert ended(pid) == 130, (run / "log").read_text()
    log = (run / "log").read_text()
    assert "stopped by SIGTERM" in log and kept in log and "Traceback" not in log, log
    assert not (run / "run" / ".lock").exists()
    if kept.endswith("saved"):
        assert finish(lab, run) == 0, (run / "log").read_text()
        check_outcome(lab, run)


CASES = {
    f"signal-{name}-{call}": functools.partial(interrupt, owner=owner, name=name, call=call, kept=kept)
    for owner, name, call, kept in PLACES
}
