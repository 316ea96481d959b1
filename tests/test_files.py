"""What is written appears whole or not at all."""

from pathlib import Path
from typing import BinaryIO

import pytest

from huarizo.errors import MachineError
from huarizo.files import sha256_of, whole_folder, write_whole


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


def test_digest(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_of(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
