"""Records of several files at once: no reader disturbs another, or the rest of the process."""

import csv
from pathlib import Path

from huarizo.data.records import read_records

LONG = "x" * 200_000  # characters, more than the csv module takes by itself


def test_tables_are_read_side_by_side(tmp_path: Path) -> None:
    files = [tmp_path / "a.csv", tmp_path / "b.csv"]
    for file in files:
        file.write_text(f"output\n{LONG}\n{LONG}\n")
    limit = csv.field_size_limit()
    first, second = (read_records(file, {"output"}, lambda fields: True) for file in files)
    rows = [next(first), next(second)]
    assert csv.field_size_limit() == limit
    rows += [*first, *second]
    assert [row for _, row in rows] == [{"output": LONG}] * 4
    assert csv.field_size_limit() == limit
