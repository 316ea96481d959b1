"""Each kind of file that can't be read has its message, at once and without reading more than is needed."""

import codecs
import gzip
import json
import os
import socket
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from huarizo.data import records
from huarizo.data.discovery import KNOWN
from huarizo.data.rows import read_rows, require_good
from huarizo.errors import DataError

GOOD = '{"instruction": "Q", "output": "A"}'
SHORT = {
    "<NEEDED>": "Needed are, for sharegpt: conversations; messages: messages; alpaca: instruction and output; "
    "prompt-completion: prompt and completion; text: text.",
    "<MAPPING>": "data.columns.instruction=question data.columns.output=answer.",
    "<ROWS>": 'Write a list of rows: [{"instruction": "...", "output": "..."}].',
    "<CUT>": "The download may be incomplete: fetch it again.",
    "<KNOWN>": KNOWN,
    "<QUOTING>": "Put cells with line breaks or quotation marks between quotation marks, and double those inside: "
    '"a ""b""".',
}


def complaint(path: Path, columns: dict[str, str] | None = None) -> str:
    """The message about a path, in which its folder is left out."""
    with pytest.raises(DataError) as caught:
        require_good(read_rows(path, columns), "fail")
    return str(caught.value).replace(f"{path.parent}/", "")


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
        'a.json: is not JSON: expecting value, line 2, column 12, near \'n": "Q",\\n "output": A}]\'. Mend it '
        "there, or write the file anew with a JSON library.",
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
        '"output": "A"}\'. Part values by commas, and write quotation marks inside texts as \\".',
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
        "other names",
        "a.json",
        '[{"question": "Q", "answer": "A"}]',
        "a.json: fits no format. Its fields are: 'question', 'answer'. <NEEDED> Rename the fields, or say "
        "which is which, like: <MAPPING>",
    ),
    (
        "dolly",
        "a.json",
        '[{"instruction": "Q", "context": "", "response": "A"}]',
        "a.json: fits no format. Its fields are: 'instruction', 'context', 'response'. <NEEDED> Rename the "
        "fields, or say which is which, like: data.columns.output=response data.columns.input=context.",
    ),
    (
        "strange names",
        "a.json",
        '[{"x": "Q", "y": "A"}]',
        "a.json: fits no format. Its fields are: 'x', 'y'. <NEEDED> Rename the fields, or say which is which, "
        "like: <MAPPING>",
    ),
    (
        "no fields",
        "a.json",
        "[{}]",
        "a.json: fits no format. Its fields are: none. <NEEDED> Rename the fields, or say which is which, "
        "like: <MAPPING>",
    ),
    ("header only", "a.csv", "instruction,output\n", "a.csv: has no rows. Write rows into it, or leave it out."),
    (
        "no header",
        "a.csv",
        "Q,A\nQ,A\n",
        "a.csv: fits no format. Its fields are: 'Q', 'A'. <NEEDED> Name them in the first line, or say which "
        "is which, like: <MAPPING>",
    ),
    (
        "semicolons",
        "a.csv",
        "instruction;output\nQ;A\n",
        "a.csv: has one column, 'instruction;output', which seems to be parted by ';'. Save it with commas as "
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
        "not parquet",
        "a.parquet",
        b"hello parquet",
        "a.parquet: can't be read as Parquet: 'Parquet magic bytes not found",
    ),
    ("cut parquet", "a.parquet", b"PAR1abc", "a.parquet: can't be read as Parquet: 'Parquet file size is 7 bytes"),
    (
        "ext txt",
        "a.txt",
        "x",
        "a.txt: has an extension that is not known (.txt). Huarizo reads <KNOWN>; rename it if it is one of "
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
    ("no gzip", "a.json.gz", "x" * 20, "a.json.gz: can't be unpacked as gzip: 'zlib inflate failed: incorrect header"),
    ("no zstd", "a.jsonl.zst", "x" * 20, "a.jsonl.zst: can't be unpacked as zstd: 'ZSTD decompress failed"),
    ("cut gzip", "a.jsonl.gz", gzip.compress(GOOD.encode())[:-9], "a.jsonl.gz: can't be unpacked as gzip: 'Truncated"),
    ("nothing packed", "a.jsonl.gz", gzip.compress(b""), "a.jsonl.gz: is empty (0 bytes)."),
    ("no arrow", "a.arrow", "x" * 20, "a.arrow: can't be read as Arrow: "),
    (
        "columns of different lengths",
        "a.json",
        '{"instruction": ["Q", "R"], "output": ["A"]}',
        "a.json: has columns of different lengths: 'instruction' 2, 'output' 1. Give every column a value for each",
    ),
    ("ext xlsx", "a.xlsx", "x", "a.xlsx: is a spreadsheet (.xlsx). Save it as CSV (UTF-8); Huarizo reads <KNOWN>."),
]


@pytest.mark.parametrize(("file", "content", "expected"), [pytest.param(*case, id=name) for name, *case in FILES])
def test_file(tmp_path: Path, file: str, content: str | bytes, expected: str) -> None:
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    for short, meant in SHORT.items():
        expected = expected.replace(short, meant)
    assert complaint(tmp_path / file).startswith(expected)


ROW = '{"instruction": "...", "output": "..."}'
COMPLAINTS_ABOUT_COLUMNS = [
    (
        {"instructions": "question"},
        "data.columns.instructions: Huarizo has no field of this name. Did you mean 'instruction'? The fields are: "
        "conversations, system, tools, label, messages, instruction, output, input, history, prompt, completion, text.",
    ),
    (
        {"instruction": "questions", "output": "answer"},
        "a.json: has no column 'questions' (data.columns.instruction). Did you mean 'question'? "
        "The columns are: 'question', 'answer', 'id'.",
    ),
    (
        {"instruction": "question", "output": "answer", "input": "context"},
        "a.json: has no column 'context' (data.columns.input). The columns are: 'question', 'answer', 'id'.",
    ),
    (
        {"instruction": "question", "messages": "answer"},
        "a.json: fits no format. Its fields are: 'question', 'answer', 'id'.",
    ),
]


@pytest.mark.parametrize(("columns", "expected"), COMPLAINTS_ABOUT_COLUMNS)
def test_columns_that_are_not_there(tmp_path: Path, columns: dict[str, str], expected: str) -> None:
    (tmp_path / "a.json").write_text('[{"question": "Q", "answer": "A", "id": 1}]')
    assert complaint(tmp_path / "a.json", columns).startswith(expected)


def test_no_row_is_an_object(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(["a"] * 25))
    lines = complaint(tmp_path / "a.json").splitlines()
    assert lines[0] == "a.json: has no row that can be read."
    assert lines[1] == f"  - a.json, row 1: is a text ('a'), not an object. Write an object: {ROW}."
    assert lines[20:] == [
        f"  - a.json, row 20: is a text ('a'), not an object. Write an object: {ROW}.",
        "  ... and 5 more",
    ]


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


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.json").write_text(f"[{GOOD}]")
    monkeypatch.setattr("huarizo.data.unpack.open_file", refuse)
    assert complaint(tmp_path / "a.json").startswith("a.json: may not be read by this user. Allow it: chmod u+r ")


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
