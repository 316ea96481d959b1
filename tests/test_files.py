"""What is written appears whole or not at all."""

import os
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from huarizo.errors import MachineError
from huarizo.files import append_line, make_folder, read_own, sha256_of, whole_folder, write_whole, writing
from huarizo.training.lock import RunLock


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    write_whole(target, "안녕")
    write_whole(target, b"bytes")
    assert target.read_bytes() == b"bytes"
    assert [p.name for p in target.parent.iterdir()] == ["file.txt"]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    write_whole(target, "old")

    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(MachineError, match="No space left"):
        write_whole(target, fail)
    assert target.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with pytest.raises(ZeroDivisionError), whole_folder(target) as temporary:
        (temporary / "a").write_text("half")
        _ = 1 / 0
    assert not list(tmp_path.iterdir())
    for content in ("one", "two"):
        with whole_folder(target) as temporary:
            (temporary / "a").write_text(content)
            assert not (target / "a").exists() or content == "two"
    assert (target / "a").read_text() == "two" and [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "I/O error")])
def test_a_folder_keeps_its_name_where_the_last_step_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    target, replace = tmp_path / "folder", os.replace
    target.mkdir()
    (target / "a").write_text("old")

    def fail_once(source: Path, destination: Path) -> None:
        if source.name.endswith(".tmp"):
            raise error
        replace(source, destination)

    monkeypatch.setattr(os, "replace", fail_once)
    with pytest.raises((KeyboardInterrupt, MachineError)), whole_folder(target) as temporary:
        (temporary / "a").write_text("new")
    assert (target / "a").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_libraries_in_rust_say_of_the_disk_is_reported(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(MachineError, match=r"could not be written: .*\. "), writing(tmp_path / "x"):
        save_file({"a": torch.zeros(2)}, tmp_path / "gone" / "x")
    with pytest.raises(ValueError, match="else"), writing(tmp_path / "x"):
        raise ValueError("something else")


def test_digest(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_of(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_line_is_whole_however_little_is_taken_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: write(descriptor, bytes(content)[:3]))
    append_line(tmp_path / "metrics.jsonl", '{"step": 1}')
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("cut", [True, False])
def test_half_a_line_of_a_full_disk_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: bool) -> None:
    file, write, left = tmp_path / "metrics.jsonl", os.write, [20]

    def small_disk(descriptor: int, content: bytes) -> int:
        if not left[0]:
            raise OSError(28, "No space left on device")
        done = write(descriptor, bytes(content)[: left[0]])
        left[0] -= done
        return done

    def broken(descriptor: int, length: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", small_disk)
        if not cut:
            patch.setattr(os, "ftruncate", broken)
        append_line(file, '{"step": 1}')
        with pytest.raises(OSError, match="No space left"):
            append_line(file, '{"step": 2}')
    assert file.read_text() == '{"step": 1}\n' + ("" if cut else '{"step":')
    append_line(file, '{"step": 3}')
    assert file.read_text() == '{"step": 1}\n{"step": 3}\n'


@pytest.mark.parametrize("length", [0, 5, 4095, 4096, 10_000])
def test_a_torn_line_of_any_length_is_cut_off(tmp_path: Path, length: int) -> None:
    for before in ("", "whole\n"):
        (tmp_path / "file").write_text(before + "x" * length)
        append_line(tmp_path / "file", "next")
        assert (tmp_path / "file").read_text() == before + "next\n"


def in_place_of(path: Path, kind: str, treasure: Path) -> None:
    """What a hostile archive may put where a file is to be written."""
    treasure.write_text("precious")
    if kind == "link":
        path.symlink_to(treasure)
    elif kind == "dangling":
        path.symlink_to(path.with_name("nowhere"))
    elif kind == "hard link":
        path.hardlink_to(treasure)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()


@pytest.mark.parametrize("kind", ["link", "dangling", "hard link", "pipe", "folder"])
def test_nothing_is_written_through_what_stands_in_a_files_place(tmp_path: Path, kind: str) -> None:
    run, treasure = tmp_path / "run", tmp_path / "treasure"
    run.mkdir()
    for name in (".lock", "metrics.jsonl", "samples.jsonl", "adapter"):
        in_place_of(run / name, kind, treasure)
    with pytest.raises(MachineError, match=r"lock: could not be written.*(remove it|Remove it|Choose)"), RunLock(run):
        pass
    with pytest.raises(MachineError), writing(run / "metrics.jsonl"):
        append_line(run / "metrics.jsonl", "{}")
    if kind == "folder":
        with pytest.raises(MachineError, match="Is a directory"):
            write_whole(run / "samples.jsonl", "{}")
    else:
        write_whole(run / "samples.jsonl", "{}")  # takes the name, not what it leads to
    assert treasure.read_text() == "precious" and not (run / "nowhere").exists()


def test_no_result_is_written_through_a_link(tmp_path: Path) -> None:
    elsewhere, target = tmp_path / "elsewhere", tmp_path / "adapter"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("precious")
    target.symlink_to(elsewhere)
    with whole_folder(target) as folder:
        (folder / "a").write_text("new")
    assert (elsewhere / "mine").read_text() == "precious" and [p.name for p in elsewhere.iterdir()] == ["mine"]
    assert not target.is_symlink() and (target / "a").read_text() == "new"


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "state.json")
    with pytest.raises(OSError, match="no ordinary file"):
        read_own(tmp_path / "state.json")


def test_a_folder_that_can_not_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="could not be written"):
        make_folder(tmp_path / "file" / "runs")
    with pytest.raises(MachineError, match="could not be written"):
        make_folder(tmp_path / "file")
