"""Rows for the tests of this folder: written into any container, read back, and the messages about bad ones."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from huarizo.data.discovery import KNOWN
from huarizo.data.rows import Rows, read_rows, require_good, write_skipped
from huarizo.data.turns import Exchange
from huarizo.errors import DataError

GOOD = '{"instruction": "Q", "output": "A"}'
KOREAN = "세종대왕은 1443년에 훈민정음을 만들었다. 🦙👩🏽‍🚀"
SUFFIXES = [".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"]
SUFFIXES += [".arrow", ".jsonl.gz", ".json.zst", ".csv.gz"]
USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
ABBREVIATIONS = {
    "<NEEDED>": "Required fields are, for sharegpt: conversations; messages: messages; alpaca: instruction and output; "
    "prompt-completion: prompt and completion; text: text.",
    "<MAPPING>": "data.columns.instruction=question data.columns.output=answer.",
    "<ROWS>": 'Write a list of rows: [{"instruction": "...", "output": "..."}].',
    "<CUT>": "The download may be incomplete: fetch it again.",
    "<KNOWN>": KNOWN,
    "<QUOTING>": "Put cells with line breaks or quotation marks between quotation marks, and double those inside: "
    '"a ""b""".',
    "<U>": '{"role": "user", "content": "Q"}',
    "<A>": '{"role": "assistant", "content": "A"}',
    "<S>": '{"role": "system", "content": "S"}',
    "<ROLES>": "Write one of system, user, assistant, tool, or a usual other name of these.",
    "<LIST>": 'Write a list of {"role": ..., "content": ...} objects, the user first, the assistant last.',
}
"""Parts of rows and messages that stand in many test cases."""

CALL = {"name": "weather", "arguments": {"city": "Busan"}}
OPENAI = {
    "messages": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c1", "type": "function", "function": CALL | {"arguments": json.dumps(CALL["arguments"])}}]},
        {"role": "tool", "tool_call_id": "c1", "content": '{"c": 21}'},
        {"role": "assistant", "content": "21 C."},
    ],
    "tools": [{"type": "function", "function": {"name": "weather"}}],
}  # fmt: skip
SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "Weather?"}, {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": '{"c": 21}'}, {"from": "gpt", "value": "21 C."},
    ],
    "system": "", "tools": '[{"name": "weather"}]',
}  # fmt: skip


def in_full(text: str) -> str:
    """The text with its abbreviations written out."""
    for short, meant in ABBREVIATIONS.items():
        text = text.replace(short, meant)
    return text


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    """Records in the container that the suffix says. In tables, lists are written as JSON."""
    suffix = path.suffix
    if suffix in (".gz", ".zst"):
        plain = write(path.with_suffix(""), records)
        packing = {".gz": "gzip", ".zst": "zstd"}[suffix]
        with pa.CompressedOutputStream(str(path), packing) as file:
            file.write(plain.read_bytes())
        plain.unlink()
    elif suffix == ".arrow":
        table = pa.Table.from_pylist(records)
        with pa.ipc.new_stream(str(path), table.schema) as stream:
            stream.write_table(table)
    elif suffix == ".json":
        path.write_bytes(json.dumps(records, ensure_ascii=False).encode())
    elif suffix in (".jsonl", ".ndjson"):
        path.write_bytes("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
    elif suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(records[0]), delimiter="," if suffix == ".csv" else "\t")
            table.writeheader()
            for record in records:
                table.writerow({k: json.dumps(v) if isinstance(v, list) else v for k, v in record.items()})
    return path


def read(tmp_path: Path, *records: Any) -> Rows:
    """What is read of a JSON file with these records."""
    return read_rows(write(tmp_path / "a.json", list(records)))


def conversations(rows: Rows) -> list[tuple[str, tuple[Exchange, ...]]]:
    """System text and exchanges of each row, all of which must be good."""
    return [(row.system, row.exchanges) for row in require_good(rows, "fail")]


def exchanges(tmp_path: Path, *turns: Any) -> tuple[Exchange, ...]:
    """What the turns of one conversation become."""
    (row,) = require_good(read(tmp_path, {"messages": turns}), "fail")
    return row.exchanges


def complaint(path: Path, columns: dict[str, str] | None = None) -> str:
    """The error about a path, without the name of its folder."""
    with pytest.raises(DataError) as caught:
        require_good(read_rows(path, columns), "fail")
    return str(caught.value).replace(f"{path.parent}/", "")


def complaint_about(path: Path, content: str | bytes) -> str:
    """The error about a file of this content, without the name of its folder."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return complaint(path)


def assert_rows_or_a_message(path: Path) -> None:
    """A file is read, or refused with an error that names it."""
    try:
        rows = read_rows(path)
        assert rows.problem_count >= rows.bad_row_count
        assert len(rows.rows) + rows.bad_row_count > 0
        [str(problem).encode() for problem in rows.problems]
        write_skipped(rows.problems, path.with_name("skipped"))
        require_good(rows, "skip")
    except DataError as error:
        str(error).encode()
        assert path.name in str(error)
