"""A disk that is full, broken, read-only or gone damages nothing that is there."""

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from huarizo.errors import MachineError
from huarizo.files import require_space, whole_folder, write_whole
from huarizo.training.checkpoint import newest_valid, save
from huarizo.training.lock import file_system
from tests.faults.operations import Operation, Operations, fail_at
from tests.limits import limited_files

FILES = {"adapter_model.safetensors": b"a" * 9000, "state.json": b"{}" * 2000}


def mounted(target: Path, *how: str) -> bool:
    target.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *how, str(target)], capture_output=True, check=False)
    return done.returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of its own; its size is set by remounting."""
    disk = tmp_path / "disk"
    if not mounted(disk, "-t", "tmpfs", "-o", "size=1m", "tmpfs"):
        pytest.skip("mounting is not allowed here; the limit on file sizes is tested instead")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def still_valid(checkpoints: Path, step: int) -> None:
    checkpoint, damaged = newest_valid(checkpoints)
    assert checkpoint is not None and checkpoint.step == step and checkpoint.files == FILES and not damaged
    assert not [p.name for p in checkpoints.iterdir() if p.name.startswith(".") and p.suffix == ".tmp"]


def test_a_disk_of_any_size_keeps_what_it_holds(small_disk: Path) -> None:
    save(small_disk, 1, FILES, {}, keep=9)
    step = 1
    used = sum(f.stat().st_blocks * 512 for f in small_disk.rglob("*"))
    for size in range(used, used + 40_000, 4096):
        subprocess.run(["mount", "-o", f"remount,size={size}", str(small_disk)], check=True)
        try:
            save(small_disk, step + 1, FILES, {}, keep=1)
            step += 1
        except MachineError as error:
            assert "No space left" in str(error) and "Free some space" in str(error)
        still_valid(small_disk, step)
    assert 1 < step < 11, "some fitted, some did not"


@pytest.mark.parametrize("limit", [0, 1, 100, 4000, 8999, 9000])
def test_a_limit_on_file_sizes(tmp_path: Path, limit: int) -> None:
    save(tmp_path, 1, FILES, {}, keep=9)
    outcome = pytest.raises(MachineError, match="ulimit -f") if limit < 9000 else nullcontext()
    with limited_files(limit), outcome:
        save(tmp_path, 2, FILES, {}, keep=9)
    still_valid(tmp_path, 1 if limit < 9000 else 2)


def test_a_folder_that_can_only_be_read(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    save(checkpoints, 1, FILES, {}, keep=9)
    if not mounted(checkpoints, "--bind", str(checkpoints)):
        pytest.skip("mounting is not allowed here")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(checkpoints)], check=True)
        with pytest.raises(MachineError, match="Mount it for writing"):
            save(checkpoints, 2, FILES, {}, keep=9)
        with pytest.raises(MachineError, match="Mount it for writing"):
            write_whole(checkpoints / "step-000001" / "state.json", b"other")
        with pytest.raises(MachineError), whole_folder(checkpoints / "adapter"):
            pass
        still_valid(checkpoints, 1)
    finally:
        subprocess.run(["umount", "-l", str(checkpoints)], check=True)


def count_operations(tmp_path: Path) -> int:
    operations = Operations()
    try:
        save(tmp_path, 1, FILES, {}, keep=1)
        operations.done.clear()
        save(tmp_path, 2, FILES, {}, keep=1)
    finally:
        operations.remove()
    return len(operations.done)


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.ENOTCONN, errno.ESTALE])
def test_an_error_of_any_operation(tmp_path: Path, error: int) -> None:
    (tmp_path / "count").mkdir()
    for number in range(1, count_operations(tmp_path / "count") + 1):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        save(folder, 1, FILES, {}, keep=9)
        operations, step = Operations(fail_at({number}, error)), 2
        try:
            save(folder, 2, FILES, {}, keep=1)
        except MachineError as told:
            assert os.strerror(error) in str(told)
            step = 1 if not (folder / "step-000002").exists() else 2  # the last flush may fail behind the rename
        finally:
            operations.remove()
        still_valid(folder, step)
        assert save(folder, 3, FILES, {}, keep=1).name == "step-000003"
        still_valid(folder, 3)


def test_a_flush_that_fails_is_not_tried_again(tmp_path: Path) -> None:
    flushes = 0

    def before(number: int, operation: Operation) -> None:
        nonlocal flushes
        if operation.name == "fsync":
            flushes += 1
            raise OSError(errno.EIO, "Input/output error")

    operations = Operations(before)
    try:
        with pytest.raises(MachineError, match="copy what is there"):
            save(tmp_path, 1, FILES, {}, keep=1)
    finally:
        operations.remove()
    assert flushes == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kill_at", [None, 3, 9])
def test_where_folders_can_not_be_renamed_the_manifest_is_the_commit(tmp_path: Path, kill_at: int | None) -> None:
    save(tmp_path, 1, FILES, {}, keep=9)
    seen: list[str] = []

    def before(number: int, operation: Operation) -> None:
        if operation.name == "replace" and ".tmp" in str(operation.args[0]):
            seen.append("replace")
            raise OSError(errno.EPERM, "Operation not permitted")
        if seen:
            seen.append(operation.name)
            if kill_at is not None and len(seen) > kill_at + 4:
                raise KeyboardInterrupt

    operations = Operations(before)
    try:
        save(tmp_path, 2, FILES, {}, keep=9)
    except KeyboardInterrupt:
        pass
    finally:
        operations.remove()
    checkpoint, damaged = newest_valid(tmp_path)
    assert checkpoint is not None and checkpoint.step == (2 if kill_at is None else 1) and checkpoint.files == FILES
    assert damaged == ([] if kill_at is None else ["step-000002: manifest.json is missing"])


def test_space_is_looked_for_before_the_start(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet", 1, "checkpoints")
    with pytest.raises(MachineError, match=r"1,000,000,000,000 MB are needed for checkpoints, .*free"):
        require_space(tmp_path / "not" / "yet", 10**18, "checkpoints")


def test_the_file_system_is_known(small_disk: Path) -> None:
    assert file_system(small_disk / "x") == "tmpfs"
