"""Packed files are read as if they were unpacked, and never unpack without bound."""

import gzip
from pathlib import Path

import pyarrow as pa
import pytest

from huarizo.data.rows import read_rows
from huarizo.errors import DataError
from tests.data.reading import GOOD, complaint, complaint_about, in_full

# Name, file, content, how the message begins.
FILES = [
    ("no gzip", "a.json.gz", "x" * 20, "a.json.gz: can't be unpacked as gzip: 'zlib inflate failed: incorrect header"),
    ("no zstd", "a.jsonl.zst", "x" * 20, "a.jsonl.zst: can't be unpacked as zstd: 'ZSTD decompress failed"),
    ("cut gzip", "a.jsonl.gz", gzip.compress(GOOD.encode())[:-9], "a.jsonl.gz: can't be unpacked as gzip: 'Truncated"),
    ("nothing packed", "a.jsonl.gz", gzip.compress(b""), "a.jsonl.gz: is empty (0 bytes)."),
]


@pytest.mark.parametrize(("file", "content", "expected"), [pytest.param(*case, id=name) for name, *case in FILES])
def test_a_packed_file_that_can_not_be_unpacked(tmp_path: Path, file: str, content: str | bytes, expected: str) -> None:
    assert complaint_about(tmp_path / file, content).startswith(in_full(expected))


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.json").write_text(f"[{GOOD}]")
    monkeypatch.setattr("huarizo.data.unpack.open_file", refuse)
    assert complaint(tmp_path / "a.json").startswith("a.json: may not be read by this user. Allow it: chmod u+r ")


def test_a_packed_file_does_not_unpack_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huarizo.data.unpack.UNPACKED", 2**20)
    for suffix in (".jsonl.gz", ".jsonl.zst", ".json.gz"):
        path = tmp_path / f"a{suffix}"
        with pa.CompressedOutputStream(str(path), "gzip" if suffix.endswith("gz") else "zstd") as file:
            for _ in range(40):
                file.write(b"\n" * 2**18)
        with pytest.raises(DataError, match="unpacks to more than 200 times its size"):
            read_rows(path)
