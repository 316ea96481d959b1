"""Parquet and Arrow files become records, and a damaged one is reported."""

import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from huarizo.data.rows import read_rows
from huarizo.data.turns import Exchange
from tests.data.reading import (
    ANSWER,
    USER,
    assert_rows_or_a_message,
    complaint,
    complaint_about,
    conversations,
    in_full,
    write,
)

# Name, file, content, how the message begins.
FILES = [
    (
        "not parquet",
        "a.parquet",
        b"hello parquet",
        "a.parquet: can't be read as Parquet: 'Parquet magic bytes not found",
    ),
    ("cut parquet", "a.parquet", b"PAR1abc", "a.parquet: can't be read as Parquet: 'Parquet file size is 7 bytes"),
    ("no arrow", "a.arrow", "x" * 20, "a.arrow: can't be read as Arrow: "),
]


@pytest.mark.parametrize(("file", "content", "expected"), [pytest.param(*case, id=name) for name, *case in FILES])
def test_a_file_that_is_not_what_its_name_says(tmp_path: Path, file: str, content: str | bytes, expected: str) -> None:
    assert complaint_about(tmp_path / file, content).startswith(in_full(expected))


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = pa.array(["Q", "Q", "Q"])
    pq.write_table(pa.table({"instruction": texts, "output": pa.array([None, 1.5, float("nan")])}), path)
    message = complaint(path)
    assert "  - a.parquet, row 1, field 'output': is null. Write a text, or delete the row.\n" in message
    assert "  - a.parquet, row 2, field 'output': is a number (1.5). Write it as a string: \"1.5\".\n" in message
    assert "  - a.parquet, row 3, field 'output': is NaN. Write a text, or delete the row.\n" in message
    pq.write_table(pa.table({"instruction": texts, "output": pa.array([b"a", b"b", b"c"])}), path)
    assert "row 1, field 'output': is of the type bytes. Write a text, or delete the row.\n" in complaint(path)
    pq.write_table(pa.table({"instruction": texts[:0], "output": texts[:0]}), path)
    assert complaint(path) == "a.parquet: has no rows. Write rows into it, or leave it out."
    pq.write_table(pa.table({"question": texts, "answer": texts}), path)
    assert complaint(path).startswith("a.parquet: fits no format. Its fields are: 'question', 'answer'.")
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert complaint(path).endswith("It may be cut off or damaged: download or write it again.")
    bad = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff"))
    pq.write_table(pa.table({"instruction": bad, "output": texts[:1]}), path)
    expected = "a.parquet: has a text column with bytes that are not UTF-8. Decode it before writing it."
    assert complaint(path) == expected


def test_what_save_to_disk_leaves(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    one = Dataset.from_list([{"instruction": "Q", "output": "A", "id": 1}] * 3)
    one.save_to_disk(tmp_path / "one", num_shards=2)
    assert conversations(read_rows(tmp_path / "one")) == [("", (Exchange("Q", "", "A"),))] * 3
    DatasetDict({"train": one.select([0]), "test": one}).save_to_disk(tmp_path / "several")
    assert len(read_rows(tmp_path / "several").rows) == 1, "the training split only"
    table = one.data.table
    with pa.ipc.new_file(str(tmp_path / "footer.arrow"), table.schema) as file:
        file.write_table(table)
    assert len(read_rows(tmp_path / "footer.arrow").rows) == 3


@settings(max_examples=8, deadline=None)  # each starts a process; more stand in tests/sandbox
@given(st.data())
def test_damaged_parquet_is_rows_or_a_message(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder, "a.parquet"), [{"messages": [USER, ANSWER]}] * 3)
        content = bytearray(path.read_bytes())
        for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
            content[place] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
        assert_rows_or_a_message(path)
