"""What can go wrong with the disk while a run goes on, beside being killed; each case checks its own outcome."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.faults.children import Lab, check_after_kill, check_outcome, ended, finish, start
from tests.faults.operations import Operation, fail_at


def _at(lab: Lab, share: float) -> int:
    """The number of the file operation at this share of an undisturbed run."""
    return round(share * lab.operations)


def disk_full_for_a_while(lab: Lab, run: Path) -> None:
    """Checkpoints fail for some time: training goes on, says so, and ends with the same result."""
    before = fail_at(range(_at(lab, 0.33), _at(lab, 0.45)), errno.ENOSPC, inside=run / "run" / "checkpoints")
    assert ended(start(run, lab.folder / "recipe.yaml", before)) == 0, _log(run)
    assert "could not be saved" in _log(run) and "Training continues" in _log(run)
    check_outcome(lab, run)


def progress_can_not_be_written(lab: Lab, run: Path) -> None:
    """A line of metrics.jsonl fails: it is said once, and the file is complete in the end."""
    before = fail_at(range(_at(lab, 0.24), _at(lab, 0.48)), errno.EIO, inside=run / "run" / "metrics.jsonl")
    assert ended(start(run, lab.folder / "recipe.yaml", before)) == 0, _log(run)
    assert _log(run).count("Continuing without it") == 1
    check_outcome(lab, run)


def disk_stays_full(lab: Lab, run: Path) -> None:
    """From some moment on nothing can be written: exit 3, the adapter is rescued, the run can be resumed."""
    before = fail_at(range(_at(lab, 0.48), 10**9), errno.ENOSPC, inside=run / "run")
    assert ended(start(run, lab.folder / "recipe.yaml", before)) == 3, _log(run)
    _check_rescued(lab, run)
    assert finish(lab, run) == 0, _log(run)
    check_outcome(lab, run)


def folder_vanishes(lab: Lab, run: Path) -> None:
    """The drive is unmounted: no step is promised any more; mounted again, the run goes on."""
    _vanish(lab, run, then=lambda folder: None)


def folder_is_replaced(lab: Lab, run: Path) -> None:
    """Where the drive was, there is an empty folder, as below a mount point."""
    _vanish(lab, run, then=lambda folder: (folder / "checkpoints").mkdir(parents=True))


def _vanish(lab: Lab, run: Path, then: Callable[[Path], None]) -> None:
    folder, away, moment = run / "run", run / "away", _at(lab, 0.7)

    def before(number: int, operation: Operation) -> None:
        if number == moment:
            folder.rename(away)
            then(folder)

    assert ended(start(run, lab.folder / "recipe.yaml", before)) == 3, _log(run)
    _check_rescued(lab, run)
    shutil.rmtree(folder, ignore_errors=True)
    away.rename(folder)
    check_after_kill(run)
    assert finish(lab, run) == 0, _log(run)
    check_outcome(lab, run)


def _check_rescued(lab: Lab, run: Path) -> None:
    said = _log(run).splitlines()[-1]
    assert said.startswith("huarizo: ") and "Traceback" not in _log(run), said
    place = Path(said.partition("The trained adapter is in ")[2].partition(";")[0])
    rescued = (place / "adapter_model.safetensors").read_bytes()
    assert rescued == (lab.folder / "whole" / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(place)


def _log(run: Path) -> str:
    return (run / "log").read_text()


CASES = {
    case.__name__: case
    for case in (
        disk_full_for_a_while, progress_can_not_be_written, disk_stays_full, folder_vanishes, folder_is_replaced,
    )
}  # fmt: skip
