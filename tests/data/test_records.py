"""JSON, JSON lines, CSV and TSV files become numbered records; each kind that can't be read has its message."""

import codecs
import csv
import json
from pathlib import Path
from typing import Any

import pytest

from huarizo.data import records
from huarizo.data.rows import Row, read_rows, require_good
from huarizo.data.turns import Exchange
from huarizo.errors import DataError
from tests.data.reading import GOOD, complaint, complaint_about, conversations, in_full

# Name, file, content, how the message begins.
FILES = [
    ("empty file", "a.json", "", "a.json: is empty (0 bytes). Write rows into it, or download it again."),
    ("blank", "a.json", " \n\t\n", "a.json: is empty (only white space). Write rows into it, or download it again."),
    (
        "bom only",
        "a.csv",
        codecs.BOM_UTF8,
        "a.csv: is empty (only white space). Write rows into it, or download it again.",
    ),
    ("empty list", "a.json", "[]", "a.json: is an empty list. Write rows into it, or download it again."),
    ("no lines", "a.jsonl", "\n \n", "a.jsonl: is empty (only white space). Write rows into it, or download it again."),
    (
        "not json",
        "a.json",
        '[{"instruction": "Q",\n "output": A}]',
        'a.json: is not JSON: expecting value, line 2, column 12, near \'n": "Q",\\n "output": A}]\'. Fix it '
        "there, or rewrite the file with a JSON library.",
    ),
    (
        "single quotes",
        "a.json",
        "[{'instruction': 'Q'}]",
        "a.json: is not JSON: expecting property name enclosed in double quotes, line 1, column 3, near "
        "\"[{'instruction': 'Q'}]\". Put names between double quotes, and no comma after the last one.",
    ),
    (
        "raw newline",
        "a.json",
        '[{"instruction": "Q\n", "output": "A"}]',
        'a.json: is not JSON: invalid control character, line 1, column 20, near \'[{"instruction": "Q\\n", '
        '"output": "A"}]\'. Write line breaks and tabs inside texts as \\n and \\t.',
    ),
    (
        "quote in text",
        "a.json",
        '[{"instruction": "say "hi"", "output": "A"}]',
        'a.json: is not JSON: expecting \',\' delimiter, line 1, column 24, near \'instruction": "say "hi"", '
        '"output": "A"}\'. Separate values with commas, and write quotation marks inside texts as \\".',
    ),
    (
        "unclosed",
        "a.json",
        '[{"instruction": "Q", "output": "A}]',
        'a.json: is not JSON: unterminated string, line 1, column 33, near \'on": "Q", "output": "A}]\'. Close '
        'the text with a quotation mark, and write those inside it as \\".',
    ),
    (
        "concatenated",
        "a.json",
        '{"instruction": "Q",\n"output": "A"}\n{"instruction": "Q",\n"output": "A"}\n',
        'a.json: is not JSON: extra data, line 3, column 1, near \'"Q",\\n"output": "A"}\\n{"instruction": '
        '"Q",\'. Put the rows into one list, [row, row], or one on each line of a .jsonl file.',
    ),
    (
        "cut in text",
        "a.json",
        '[{"instruction": "Q", "output": "A"}, {"instr',
        "a.json: ends in the middle of a JSON value, after 45 bytes (line 1). <CUT>",
    ),
    (
        "cut in list",
        "a.json",
        '[{"instruction": "Q", "output": "A"},\n',
        "a.json: ends in the middle of a JSON value, after 38 bytes (line 2). <CUT>",
    ),
    (
        "cut in word",
        "a.json",
        '[{"instruction": "Q", "output": tru',
        "a.json: ends in the middle of a JSON value, after 35 bytes (line 1). <CUT>",
    ),
    (
        "scalar",
        "a.json",
        "42",
        "a.json: holds a single JSON number or truth value, not a list of rows. <ROWS>",
    ),
    (
        "text",
        "a.json",
        '"hello"',
        "a.json: holds a single JSON string, not a list of rows. <ROWS>",
    ),
    (
        "null",
        "a.json",
        "null",
        "a.json: holds a single JSON null, not a list of rows. <ROWS>",
    ),
    (
        "deep",
        "a.json",
        "[" * 200_000,
        "a.json: is nested too deeply. Write rows as flat objects, or lists of turns in them.",
    ),
    (
        "several lists",
        "a.json",
        '{"train": [1], "test": [2]}',
        "a.json: is an object with several lists: 'train', 'test'. Keep the list of rows only, or write each "
        "list to a file of its own.",
    ),
    ("empty inner", "a.json", '{"data": []}', "a.json: is an empty list. Write rows into it, or download it again."),
    (
        "semicolons",
        "a.csv",
        "instruction;output\nQ;A\n",
        "a.csv: has one column, 'instruction;output', which seems to be separated by ';'. Save it with commas as "
        ".csv, or with tabs as .tsv.",
    ),
    (
        "columns twice",
        "a.csv",
        "instruction,output,output\nQ,A,B\n",
        "a.csv: has several columns of the same name: 'output'. Rename or delete all but one.",
    ),
    (
        "header quote",
        "a.csv",
        '"instruction,output\nQ,A\n',
        "a.csv: line 1, the header: opens a quotation mark that is never closed. <QUOTING>",
    ),
    (
        "old mac",
        "a.csv",
        "instruction,output\rQ,A\r",
        "a.csv: line 1, the header: has a carriage return outside of quotation marks. <QUOTING>",
    ),
    (
        "cp949",
        "a.json",
        b'[{"instruction": "\xc7\xd1\xb1\xb9\xbe\xee", "output": "A"}]',
        "a.json: is not UTF-8: byte 0xC7 at byte offset 18, line 1. Convert it: iconv -f CP949 -t UTF-8 a.json "
        "> a.utf8.json.",
    ),
    (
        "latin",
        "a.jsonl",
        b'{"instruction": "Q", "output": "A"}\n{"instruction": "caf\xe9 au lait"}\n',
        "a.jsonl: is not UTF-8: byte 0xE9 at byte offset 56, line 2. Convert it: iconv -f CP1252 -t UTF-8 "
        "a.jsonl > a.utf8.jsonl.",
    ),
    (
        "utf16",
        "a.json",
        codecs.BOM_UTF16_LE + "[]".encode("utf-16-le"),
        "a.json: is UTF-16, not UTF-8 (byte order mark at offset 0, line 1). Convert it: iconv -f UTF-16 -t "
        "UTF-8 a.json > a.utf8.json.",
    ),
    (
        "utf16 bare",
        "a.csv",
        "instruction".encode("utf-16-be"),
        "a.csv: looks like UTF-16, not UTF-8 (zero byte at offset 0, line 1). Convert it: iconv -f UTF-16BE -t "
        "UTF-8 a.csv > a.utf8.csv.",
    ),
    (
        "utf32",
        "a.json",
        codecs.BOM_UTF32_LE + "[]".encode("utf-32-le"),
        "a.json: is UTF-32, not UTF-8 (byte order mark at offset 0, line 1). Convert it: iconv -f UTF-32 -t "
        "UTF-8 a.json > a.utf8.json.",
    ),
    (
        "cut char",
        "a.csv",
        "instruction,output\nQ,한".encode()[:-1],
        "a.csv: ends in the middle of a character, at byte offset 21, line 2. Download or copy it again.",
    ),
    (
        "zip",
        "a.json",
        b"PK\x03\x04abc",
        "a.json: is a ZIP archive (or an Excel file). Unpack it first, or save the sheet as CSV.",
    ),
    ("gzip", "a.csv", b"\x1f\x8babc", "a.csv: is packed with gzip. Unpack it first: gunzip < FILE > NEW_FILE."),
    (
        "lfs",
        "a.parquet",
        b"version https://git-lfs.github.com/spec/v1\n",
        "a.parquet: is a Git LFS pointer, not the data. Fetch the data: git lfs pull.",
    ),
    (
        "html",
        "a.json",
        "<!DOCTYPE html><html>",
        "a.json: is a web page. Download the file itself (the 'raw' or 'resolve' link).",
    ),
    (
        "zeros",
        "a.csv",
        bytes(100),
        "a.csv: begins with zero bytes, so it was never written completely. Copy or download it again.",
    ),
    (
        "columns of different lengths",
        "a.json",
        '{"instruction": ["Q", "R"], "output": ["A"]}',
        "a.json: has columns of different lengths: 'instruction' 2, 'output' 1. Give every column a value for each",
    ),
]


@pytest.mark.parametrize(("file", "content", "expected"), [pytest.param(*case, id=name) for name, *case in FILES])
def test_a_file_that_can_not_be_read(tmp_path: Path, file: str, content: str | bytes, expected: str) -> None:
    assert complaint_about(tmp_path / file, content).startswith(in_full(expected))


def sparse(path: Path, beginning: bytes, size: int) -> Path:
    """A file of `size` bytes that takes no room on the disk."""
    with path.open("wb") as file:
        file.write(beginning)
        file.truncate(size)
    return path


def test_large_json_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sparse(tmp_path / "a.json", b'[{"instruction": "Q", ', 2 * 2**30)
    command = "jq -cn --stream 'fromstream(1|truncate_stream(inputs))' a.json > a.jsonl"
    expected = "a.json: is one JSON value of 2.0 GiB, too large to load at once. Convert it to JSON lines or Parquet: "
    assert complaint(path) == f"{expected}{command}."
    monkeypatch.setattr(records, "JSON_LIMIT", 100)
    path.write_text(f"{GOOD}\n" * 10)
    assert len(read_rows(path).rows) == 10, "JSON lines under the name .json are read line by line"


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
def test_long_line_is_not_loaded(tmp_path: Path, suffix: str) -> None:
    path = sparse(
        tmp_path / f"a{suffix}", b"instruction,output\tx\n" if suffix != ".jsonl" else GOOD.encode() + b"\n", 2 * 2**30
    )
    expected = f"a{suffix}: line 2 is longer than 16 MiB. Write one row a line, or check that this is a file of rows."
    assert complaint(path) == expected


def test_large_cell_and_open_quotation_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "LINE_LIMIT", 2**20)
    path = tmp_path / "a.csv"
    path.write_text('instruction,output\nQ,A\nQ,"' + ("x" * 1000 + "\n") * 1100 + '"\nQ,A\n')
    rows = read_rows(path)
    assert [row.number for row in rows.rows][:1] == [2]
    assert rows.problems[0].number == 3
    assert rows.problems[0].what == "has a cell over 1 MiB, or a quotation mark that is never closed"


# Name, what follows a good first line, the message after "a.jsonl".
LINES = [
    (
        "line not json",
        'Q and A\n{"instruction": "Q", "output": "A"}\n',
        ", row 2: is not JSON: expecting value, column 1, near 'Q and A\\n'. Write each row as one JSON object "
        "on one line.",
    ),
    (
        "line comma",
        '{"instruction": "Q", "output": "A"},\n',
        ', row 2: is not JSON: extra data, column 36, near \' "Q", "output": "A"},\\n\'. Write each row as one '
        "JSON object on one line.",
    ),
    (
        "line quotes",
        "{'instruction': 'Q'}\n",
        ", row 2: is not JSON: expecting property name enclosed in double quotes, column 2, near "
        "\"{'instruction': 'Q'}\\n\". Put names between double quotes, and no comma after the last one.",
    ),
    (
        "line tab",
        '{"instruction": "a\tb", "output": "A"}\n',
        ', row 2: is not JSON: invalid control character, column 19, near \'{"instruction": "a\\tb", "output": '
        '"A"}\\n\'. Write line breaks and tabs inside texts as \\n and \\t.',
    ),
    (
        "line escape",
        '{"instruction": "a\\x", "output": "A"}\n',
        ', row 2: is not JSON: invalid \\escape, column 19, near \'{"instruction": "a\\\\x", "output": '
        '"A"}\\n\'. Write a backslash inside a text as \\\\.',
    ),
    (
        "line cut",
        '{"instruction": "Q", "outp',
        ", row 2: ends in the middle of a JSON value, at column 26, the end of the file. The download may be "
        "incomplete: fetch it again, or delete this line.",
    ),
    (
        "line cut word",
        '{"instruction": "Q", "output": nul',
        ", row 2: ends in the middle of a JSON value, at column 34, the end of the file. The download may be "
        "incomplete: fetch it again, or delete this line.",
    ),
    (
        "line scalar",
        "\n17\n",
        ', row 3: is a number (17), not an object. Write an object: {"instruction": "...", "output": "..."}.',
    ),
    ("line deep", "[" * 100_000 + "\n", ", row 2: is nested too deeply. Write a flat object, or delete the line."),
    (
        "line null",
        '\r\n{"instruction": "Q", "output": null}\r\n',
        ", row 3, field 'output': is null. Write a text, or delete the row.",
    ),
]


@pytest.mark.parametrize(("bad", "expected"), [pytest.param(*case, id=name) for name, *case in LINES])
def test_lines(tmp_path: Path, bad: str, expected: str) -> None:
    assert f"\n  - a.jsonl{expected}\n" in complaint_about(tmp_path / "a.jsonl", f"{GOOD}\n{bad}")


# Name, file, content, the message after the file's name.
TABLES = [
    (
        "cell empty",
        "a.csv",
        "instruction,output\nQ,A\nQ,\n",
        ", row 3, field 'output': is empty. Write a text, or delete the row.",
    ),
    (
        "cells more",
        "a.csv",
        "instruction,output\nQ,A\nQ,A, and B\n",
        ", row 3: has 3 cells where the header has 2. Put texts with commas between quotation marks.",
    ),
    (
        "cells fewer",
        "a.csv",
        "instruction,input,output\nQ,,A\nQ,A\n",
        ", row 3: has 2 cells where the header has 3. Add the missing ones; empty cells are separated by commas too.",
    ),
    (
        "after lines",
        "a.csv",
        'instruction,output\n"Q\n2\n3",A\nQ,\n',
        ", row 5, field 'output': is empty. Write a text, or delete the row.",
    ),
    (
        "quote open",
        "a.csv",
        'instruction,output\nQ,A\nQ,"A\n',
        ", row 3: opens a quotation mark that is never closed. <QUOTING>",
    ),
    (
        "quote inside",
        "a.csv",
        'instruction,output\n"a "b" c",A\n',
        ", row 2: has a quotation mark inside a quoted cell that is not doubled. <QUOTING>",
    ),
    (
        "cr",
        "a.csv",
        "instruction,output\nQ,a\rb\n",
        ", row 2: has a carriage return outside of quotation marks. <QUOTING>",
    ),
    (
        "tsv cells",
        "a.tsv",
        "instruction\toutput\nQ\tA\nQ\tA\tB\n",
        ", row 3: has 3 cells where the header has 2. Put texts with tabs between quotation marks.",
    ),
    (
        "csv turns",
        "a.csv",
        "messages\nhello\n",
        ", row 2, field 'messages': is a text ('hello'), not a list. Write a list of {\"role\": ..., "
        '"content": ...} objects, the user first, the assistant last.',
    ),
]


@pytest.mark.parametrize(("file", "content", "expected"), [pytest.param(*case, id=name) for name, *case in TABLES])
def test_tables(tmp_path: Path, file: str, content: str, expected: str) -> None:
    assert f"\n  - {file}{in_full(expected)}" in complaint_about(tmp_path / file, content)


@pytest.mark.parametrize(
    "data",
    [
        '{"data": [%s, %s], "version": "1.0"}',
        '{"rows": [\n%s\n,%s]}',
        "\ufeff[%s,\r\n%s]\r\n",
        "%s\n%s",
        "\n\n%s\r\n\r\n%s\r\n",
        "\ufeff%s\n%s\n",
    ],
    ids=["data", "rows", "mark", "lines", "blank lines", "lines with mark"],
)
def test_shapes_of_json(tmp_path: Path, data: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes((data % ('{"instruction": "Q1", "output": "A"}', '{"instruction": "Q2", "output": "A"}')).encode())
    assert [row.exchanges[0].instruction for row in require_good(read_rows(path), "fail")] == ["Q1", "Q2"]


TURN_LISTS = [[{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]] * 2


@pytest.mark.parametrize(
    "value",
    [
        {"instruction": ["Q", "Q"], "input": ["", ""], "output": ["A", "A"]},
        {"instruction": {"0": "Q", "1": "Q"}, "output": {"0": "A", "1": "A"}},
        {"messages": TURN_LISTS},
        {"messages": TURN_LISTS, "id": [1, 2]},
    ],
    ids=["columns", "pandas", "one column", "turns"],
)
def test_json_by_columns(tmp_path: Path, value: dict[str, Any]) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(value))
    assert conversations(read_rows(path)) == [("", (Exchange("Q", "", "A"),))] * 2
    assert [row.number for row in read_rows(path).rows] == [1, 2]


def test_columns_under_other_names_are_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"question": ["Q"], "answer": ["A"]}))
    with pytest.raises(DataError, match="data.columns.instruction=question data.columns.output=answer"):
        read_rows(path)
    rows = read_rows(path, {"instruction": "question", "output": "answer"})
    assert conversations(rows) == [("", (Exchange("Q", "", "A"),))]


def test_one_object_is_one_row_and_json_under_the_name_of_lines(tmp_path: Path) -> None:
    record = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    (tmp_path / "a.json").write_text(json.dumps(record, indent=2))
    (tmp_path / "b.jsonl").write_text(json.dumps(record, indent=2))
    (tmp_path / "c.jsonl").write_text(json.dumps([record, record], indent=2))
    (tmp_path / "d.jsonl").write_text(json.dumps([record, record]))
    for name, expected in {"a.json": 1, "b.jsonl": 1, "c.jsonl": 2, "d.jsonl": 2}.items():
        assert len(require_good(read_rows(tmp_path / name), "fail")) == expected, name


def test_marks_line_ends_and_numbers_of_tables(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(codecs.BOM_UTF8 + 'output, instruction\r\n"A\r\n""2""",Q1\r\n\r\n한국 🦙,"Q,2"\r\n'.encode())
    rows = require_good(read_rows(path), "fail")
    assert rows == [
        Row(str(path), 2, "", (Exchange("Q1", "", 'A\r\n"2"'),)),
        Row(str(path), 5, "", (Exchange("Q,2", "", "한국 🦙"),)),
    ]
    limit = csv.field_size_limit()
    path.write_text(f"instruction,output\nQ,{'x' * 500_000}\n")
    assert len(require_good(read_rows(path), "fail")[0].exchanges[0].output) == 500_000
    assert csv.field_size_limit() == limit, "the csv module is left as it was"


def test_numbers_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"instruction": "Q\\u2028", "output": "A"}\n\n{"instruction": "Q\u2028\u0085", "output": "A"}')
    assert [(row.number, row.exchanges[0].instruction) for row in read_rows(path).rows] == [
        (2, "Q\u2028"),
        (4, "Q\u2028\x85"),
    ]


LONG = "x" * 200_000  # characters, more than the csv module takes by itself


def test_tables_are_read_side_by_side(tmp_path: Path) -> None:
    files = [tmp_path / "a.csv", tmp_path / "b.csv"]
    for file in files:
        file.write_text(f"output\n{LONG}\n{LONG}\n")
    limit = csv.field_size_limit()
    first, second = (records.read_records(file, {"output"}, lambda fields: True) for file in files)
    rows = [next(first), next(second)]
    assert csv.field_size_limit() == limit
    rows += [*first, *second]
    assert [row for _, row in rows] == [{"output": LONG}] * 4
    assert csv.field_size_limit() == limit
