"""One process at a time trains in a run folder, on one machine or on several that share the folder."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from huarizo.errors import MachineError, UserError
from huarizo.runs import Run
from huarizo.training.finetune import resume
from huarizo.training.lock import STALE_AFTER, LockLostError, RunLock


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
    for left_behind in (json.dumps({"pid": 2**22 + 1, "host": platform.node()}), "not JSON"):
        (tmp_path / ".lock").write_text(left_behind)
        with RunLock(tmp_path) as lock:
            lock.require_held()
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


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
            with pytest.raises(LockLostError, match="process 77 on other-machine has taken over this run"):
                check()
    assert json.loads((tmp_path / ".lock").read_text()) == OTHER, "the other's lock stays"
