"""What is written appears whole or not at all."""

import os
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from huarizo.errors import MachineError
from huarizo.files import sha256_of, told, whole_folder, write_whole


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


def test_what_libraries_in_rust_say_of_the_disk_is_told(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(MachineError, match=r"could not be written: .*\. "), told(tmp_path / "x"):
        save_file({"a": torch.zeros(2)}, tmp_path / "gone" / "x")
    with pytest.raises(ValueError, match="else"), told(tmp_path / "x"):
        raise ValueError("something else")


def test_digest(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_of(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
