"""A path becomes data files; pipes, devices and unknown kinds are refused unread."""

import os
import socket
from pathlib import Path

import pytest

from huarizo.data.discovery import KNOWN
from huarizo.data.rows import read_rows
from tests.data.reading import GOOD, complaint, complaint_about, in_full, write

# Name, file, content, how the message begins.
FILES = [
    (
        "ext txt",
        "a.txt",
        "x",
        "a.txt: has an unknown extension (.txt). Huarizo reads <KNOWN>; rename it if it is one of "
        "these, or convert it.",
    ),
    (
        "ext none",
        "data",
        "x",
        "data: has no extension. Huarizo reads <KNOWN>; rename it if it is one of these, or convert it.",
    ),
    ("ext zip", "a.zip", "x", "a.zip: is packed (.zip). Unpack it first; Huarizo reads <KNOWN>."),
    ("ext gz", "a.gz", "x", "a.gz: is packed (.gz). Unpack it first; Huarizo reads <KNOWN>."),
    ("packed parquet", "a.parquet.gz", "x", "a.parquet.gz: is packed (.gz). Unpack it first; Huarizo reads <KNOWN>."),
    ("ext xlsx", "a.xlsx", "x", "a.xlsx: is a spreadsheet (.xlsx). Save it as CSV (UTF-8); Huarizo reads <KNOWN>."),
]


@pytest.mark.parametrize(("file", "content", "expected"), [pytest.param(*case, id=name) for name, *case in FILES])
def test_a_file_of_an_unknown_kind(tmp_path: Path, file: str, content: str | bytes, expected: str) -> None:
    assert complaint_about(tmp_path / file, content).startswith(in_full(expected))


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "alpaca.json").write_text(GOOD)
    assert complaint(tmp_path / "alpace.json") == "alpace.json: does not exist. Did you mean alpaca.json?"
    assert complaint(tmp_path / "other") == "other: does not exist. Check the name and the folder."
    (tmp_path / "link.json").symlink_to(tmp_path / "nowhere.json")
    expected = "link.json: is a link to a file that does not exist. Mend the link, or name the file itself."
    assert complaint(tmp_path / "link.json") == expected
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    assert complaint(tmp_path / "loop.json").startswith("loop.json: can't be read: Too many levels of symbolic links.")
    assert complaint(tmp_path / ("x" * 300 + ".json")).endswith("Check the name and the disk, or copy it elsewhere.")
    assert complaint(tmp_path / "nul\0.json").startswith("nul\\x00.json: can't be read: embedded null byte.")
    assert "Not a directory" in complaint(tmp_path / "alpaca.json" / "b.json")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_devices_are_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remedy = "Write the rows to a file first, and name that."
    os.mkfifo(tmp_path / "a.json")
    assert complaint(tmp_path / "a.json") == f"a.json: is a pipe, not a file. {remedy}"
    assert complaint(Path(os.devnull)).endswith(f": is a device, not a file. {remedy}")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    assert complaint(tmp_path / "zero.jsonl") == f"zero.jsonl: is a device, not a file. {remedy}"
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # a socket's name has to be short
        server.bind("s.json")
    assert complaint(tmp_path / "s.json") == f"s.json: is a socket, not a file. {remedy}"
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder" / "b.json")
    assert complaint(tmp_path / "folder").endswith(f"b.json: is a pipe, not a file. {remedy}")


def test_folders(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    known = f"Put {KNOWN} files there."
    assert complaint(folder) == f"data: is a folder without data files. {known}"
    (folder / "README.md").write_text("x")
    (folder / "dataset_infos.json").write_text("{}")
    (folder / ".hidden.json").write_text(GOOD)
    found = "'README.md', 'dataset_infos.json'"
    assert complaint(folder) == f"data: is a folder without data files (only {found}). {known}"
    (folder / "a.zip").write_text("x")
    assert complaint(folder).endswith("Unpack the archive first.")
    (folder / "a.json").write_text(f"[{GOOD}]")
    (folder / "b.json").write_text("[]")
    assert complaint(folder).endswith("b.json: is an empty list. Write rows into it, or download it again.")


def test_folder(tmp_path: Path) -> None:
    (tmp_path / "sub" / "deeper").mkdir(parents=True)
    (tmp_path / ".cache").mkdir()
    for name in ("b.json", "sub/deeper/a.csv", "a.jsonl", "sub/c.parquet", ".cache/x.json", ".x.json"):
        write(tmp_path / name, [{"instruction": name, "output": "A"}])
    for name in ("README.md", "dataset_infos.json", "LICENSE", "notes.txt"):
        (tmp_path / name).write_text("[not data")
    (tmp_path / "sub" / "again").symlink_to(tmp_path, target_is_directory=True)
    names = ["a.jsonl", "b.json", "sub/c.parquet", "sub/deeper/a.csv"]
    rows = read_rows(tmp_path)
    assert rows.files == [tmp_path / name for name in names]
    assert [(row.file, row.exchanges[0].instruction) for row in rows.rows] == [(str(tmp_path / n), n) for n in names]


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (
            [
                "data/train-00000-of-00002.parquet",
                "data/train-00001-of-00002.parquet",
                "data/test-00000-of-00001.parquet",
            ],
            ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
        ),
        (["alpaca_train.json", "alpaca_eval.json"], ["alpaca_train.json"]),
        (["default/train/0.parquet", "default/test/0.parquet"], ["default/train/0.parquet"]),
        (["trained.json", "constraints.json"], ["constraints.json", "trained.json"]),
    ],
)
def test_only_the_train_split_of_a_folder(tmp_path: Path, names: list[str], chosen: list[str]) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, [{"instruction": name, "output": "A"}])
    assert [file.relative_to(tmp_path).as_posix() for file in read_rows(tmp_path).files] == chosen


def test_a_link_keeps_the_name_it_has(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text('[{"instruction": "Q", "output": "A"}]')
    (tmp_path / "train.json").symlink_to(tmp_path / "blob")
    assert read_rows(tmp_path / "train.json").rows == read_rows(tmp_path).rows
