"""After a power cut a valid checkpoint is there, and what was replaced is whole: old or new."""

import random
import shutil
from pathlib import Path

import pytest

from huarizo.files import make_folder, write_whole
from huarizo.training.checkpoint import newest_valid, save
from tests.faults.operations import Operation, Operations
from tests.faults.power_cut import Disk, materialise


def files_of(step: int) -> dict[str, bytes]:
    return {"adapter_model.safetensors": bytes([step]) * 300, "state.json": b"{}" * step}


def recorded(run: Path, losses: list[float]) -> list[Operation]:
    """The operations of a run's folder and so many checkpoints, of which two are kept, with a mark at each promise."""
    operations = Operations()
    try:
        make_folder(run / "checkpoints")
        for step, loss in enumerate(losses, start=1):
            save(run / "checkpoints", step, files_of(step), {"heldout_loss": loss}, keep=2)
            operations.done.append(Operation("saved", (step,)))
    finally:
        operations.remove()
    return operations.done


@pytest.mark.parametrize(("seed", "times"), [(0, 1), pytest.param(1, 40, marks=pytest.mark.slow)])
def test_a_promised_checkpoint_survives_every_power_cut(tmp_path: Path, seed: int, times: int) -> None:
    root, crash = tmp_path / "before", tmp_path / "after"
    root.mkdir()
    operations = recorded(root / "runs" / "name", [3.0, 1.0, 2.0, 2.5, 2.7, 0.5])
    disk, choice, promised, seen, states = Disk(root), random.Random(seed), 0, set(), 0
    variants = [0.0, 1.0, *([0.5] * 12 * times), *([0.2, 0.8] * 4 * times)]
    for operation in operations:
        if operation.name == "saved":
            promised = operation.args[0]
        else:
            disk.do(operation)
        for share in variants:
            state = disk.after_power_cut(choice, share)
            key = (promised, hash(frozenset(state.items())))
            if key in seen:
                continue
            seen.add(key)
            states += 1
            shutil.rmtree(crash, ignore_errors=True)
            materialise(state, crash)
            checkpoint, _ = newest_valid(crash / "runs" / "name" / "checkpoints")
            assert promised == 0 or checkpoint is not None, f"nothing is left of {sorted(state)}"
            if checkpoint is not None:
                assert checkpoint.step >= promised
                assert checkpoint.files == files_of(checkpoint.step)
    assert states > 400 * times**0.5, states
    print(f"{states} states of the disk")


def test_without_flushing_the_model_finds_loss(tmp_path: Path) -> None:
    """The test above can fail: where nothing is flushed, promised checkpoints are lost."""
    root, crash = tmp_path / "before", tmp_path / "after"
    root.mkdir()
    disk = Disk(root)
    for operation in recorded(root / "name", [1.0]):
        if operation.name not in ("fsync", "saved"):
            disk.do(operation)
    materialise(disk.after_power_cut(random.Random(0), 0.0), crash)
    assert newest_valid(crash / "name" / "checkpoints")[0] is None


def test_a_folder_that_a_killed_process_made_is_flushed_by_the_next(tmp_path: Path) -> None:
    root = tmp_path / "before"
    (root / "runs" / "name" / "checkpoints").mkdir(parents=True)
    operations = Operations()
    try:
        make_folder(root / "runs" / "name" / "checkpoints")
    finally:
        operations.remove()
    folders, descriptors = [], {}
    for operation in operations.done:
        if operation.name == "open":
            descriptors[operation.result] = operation.args[0]
        elif operation.name == "fsync":
            folders.append(descriptors[operation.args[0]])
    assert {root, root / "runs", root / "runs" / "name"} <= set(folders)


def test_a_replaced_file_is_old_or_new(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    operations = Operations()
    try:
        for number in range(4):
            write_whole(root / "samples.jsonl", bytes([number]) * 50)
            operations.done.append(Operation("saved", (number,)))
    finally:
        operations.remove()
    disk, choice, promised = Disk(root), random.Random(0), -1
    for operation in operations.done:
        if operation.name == "saved":
            promised = operation.args[0]
        else:
            disk.do(operation)
        for share in (0.0, 1.0, *[0.5] * 20):
            content = disk.after_power_cut(choice, share).get("samples.jsonl")
            assert content is not None or promised < 0
            assert content is None or content in [bytes([n]) * 50 for n in (max(promised, 0), promised + 1)]
