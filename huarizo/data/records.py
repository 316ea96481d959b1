"""Reads data files into records: pairs of a row number, by which the user finds the row, and its unchecked value.

Input is a JSON, JSON-lines, CSV, Parquet or Arrow file, compressed or not. A file that isn't what its name says is
refused at once. A row that can't be read becomes a `Flaw`, so that the other rows can still be checked. Every read has
a limit, so that neither a long line nor a large JSON value fills the memory.
"""

import codecs
import csv
import json
import shlex
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from huarizo.data.columnar import read_columnar
from huarizo.data.discovery import check_columns_differ, errors_named, refusal, unknown_kind
from huarizo.data.notes import USUAL_NAMES, columns_by_usual_name
from huarizo.data.unpack import is_packed, opened
from huarizo.errors import DataError
from huarizo.hub.data_files import SUFFIXES, suffix_of
from huarizo.wording import enumerated, excerpt, shown

LINE_LIMIT = 16 * 2**20  # bytes of a line, characters of a CSV cell
_CSV_LOCK = threading.Lock()
JSON_LIMIT = 2**30  # bytes of a file that is one JSON value
VALUE_BYTES, OBJECT_BYTES = 80, 250  # upper bounds in memory: a value in a list or object, an object itself

DISGUISES = (  # first bytes of the file, what it really is, remedy
    (b"\x1f\x8b", "is packed with gzip", "Unpack it first: gunzip < FILE > NEW_FILE"),
    (b"PK\x03\x04", "is a ZIP archive (or an Excel file)", "Unpack it first, or save the sheet as CSV"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the data", "Fetch the data: git lfs pull"),
    (b"<!DOCTYPE", "is a web page", "Download the file itself (the 'raw' or 'resolve' link)"),
    (b"<!doctype", "is a web page", "Download the file itself (the 'raw' or 'resolve' link)"),
    (b"<html", "is a web page", "Download the file itself (the 'raw' or 'resolve' link)"),
    (b"\0\0\0\0", "begins with zero bytes, so it was never written completely", "Copy or download it again"),
)
ENCODINGS = (  # byte order marks, longest first
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)

CSV_REMEDY = 'Put cells with line breaks or quotation marks between quotation marks, and double those inside: "a ""b"""'
JSON_REMEDIES = (  # beginning of the json module's message, remedy
    ("Invalid control character", "Write line breaks and tabs inside texts as \\n and \\t"),
    ("Invalid \\", "Write a backslash inside a text as \\\\"),
    ("Expecting property name", "Put names between double quotes, and no comma after the last one"),
    ("Illegal trailing comma", "Delete the comma before the closing bracket"),
    ("Expecting ',' delimiter", 'Separate values with commas, and write quotation marks inside texts as \\"'),
    ("Unterminated string", 'Close the text with a quotation mark, and write those inside it as \\"'),
)

Record = tuple[int, object]


class Flaw(NamedTuple):
    """What is wrong with a row: the field ("" for the whole row), the problem, and the remedy."""

    field: str
    what: str
    remedy: str


class RepeatedNames(dict[str, object]):
    """A JSON object in which names occur more than once. `repeated` maps each such name to its count."""

    def __init__(self, pairs: list[tuple[str, object]]) -> None:
        super().__init__(pairs)
        self.repeated = {name: count for name, count in Counter(name for name, _ in pairs).items() if count > 1}


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    return value if len(value) == len(pairs) else RepeatedNames(pairs)


def _integer(digits: str) -> int | float:
    """The number; a float where Python refuses to convert so many digits."""
    return int(digits) if len(digits) < 4000 else float(digits)


parse_json = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer).decode


def read_records(path: Path, wanted: Collection[str], is_row: Callable[[Collection[str]], bool]) -> Iterator[Record]:
    """The row numbers and values of one file. In JSON lines and CSV the number is that of the row's first line.

    Args:
        path: the file.
        wanted: the columns that will be used; other columns of a Parquet or Arrow file are given as None.
        is_row: whether these field names make a row. It distinguishes an object that is a row from one that holds a
            list of rows.

    Raises:
        DataError: the file can't be read as what its name says, at once or during iteration.
    """
    if suffix_of(path.name) not in SUFFIXES:
        raise unknown_kind(path)
    suffix = suffix_of(path.name.removesuffix(path.suffix) if is_packed(path) else path.name)
    with errors_named(path), opened(path) as file:
        head = file.read(LINE_LIMIT)
    _check_beginning(path, head)
    if suffix in (".parquet", ".arrow"):
        return read_columnar(path, wanted)
    _check_encoding(path, head)
    if suffix in (".csv", ".tsv"):
        return _read_table(path, "\t" if suffix == ".tsv" else ",")
    return _read_lines(path) if _is_lines(head, suffix) else _read_json(path, is_row)


def _check_beginning(path: Path, head: bytes) -> None:
    if not head:
        raise refusal(path, "is empty (0 bytes)", "Write rows into it, or download it again")
    for start, what, remedy in DISGUISES:
        if head.startswith(start):
            raise refusal(path, what, remedy)


def _check_encoding(path: Path, head: bytes) -> None:
    for mark, encoding in ENCODINGS:
        if head.startswith(mark):
            raise refusal(
                path, f"is {encoding}, not UTF-8 (byte order mark at offset 0, line 1)", _iconv(path, encoding)
            )
    if b"\0" in head[:2]:
        offset = head.index(b"\0")
        encoding = "UTF-16LE" if offset else "UTF-16BE"
        what = f"looks like UTF-16, not UTF-8 (zero byte at offset {offset}, line 1)"
        raise refusal(path, what, _iconv(path, encoding))
    if len(head) < LINE_LIMIT and not head.removeprefix(codecs.BOM_UTF8).strip():
        raise refusal(path, "is empty (only white space)", "Write rows into it, or download it again")


def _iconv(path: Path, encoding: str) -> str:
    target = path.with_name(f"{path.stem}.utf8{path.suffix}")
    return f"Convert it: iconv -f {encoding} -t UTF-8 {shlex.quote(shown(path))} > {shlex.quote(shown(target))}"


def _decode(path: Path, data: bytes, offset: int = 0, line: int = 1) -> str:
    """Decode UTF-8 bytes that begin at byte `offset` of the file, in line `line`."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        at = error.start
        line += data.count(b"\n", 0, at)
        place = f"at byte offset {offset + at}, line {line}"
        if error.reason == "unexpected end of data":
            raise refusal(path, f"ends in the middle of a character, {place}", "Download or copy it again") from None
        try:
            codecs.getincrementaldecoder("cp949")().decode(data[at : at + 4096])
            encoding = "CP949"
        except UnicodeDecodeError:
            encoding = "CP1252"
        raise refusal(path, f"is not UTF-8: byte 0x{data[at]:02X} {place}", _iconv(path, encoding)) from None


def _is_lines(head: bytes, suffix: str) -> bool:
    """Whether a JSON file holds one value per line, whatever its name says."""
    first, _, rest = head.removeprefix(codecs.BOM_UTF8).lstrip().partition(b"\n")
    first = first.rstrip()
    if suffix == ".json":
        return first.startswith(b"{") and first.endswith(b"}") and rest.lstrip().startswith(b"{")
    return first not in (b"[", b"{") and not first.startswith(b"[{")


def _read_json(path: Path, is_row: Callable[[Collection[str]], bool]) -> Iterator[Record]:
    """The rows of a file that is one JSON value."""
    import torch

    from huarizo.machine import available_memory

    with errors_named(path), opened(path) as file:
        if not is_packed(path) and (size := path.stat().st_size) > JSON_LIMIT:
            raise _too_large(path, f"{size / 2**30:.1f} GiB")
        data = file.read(JSON_LIMIT + 1)
    if len(data) > JSON_LIMIT:
        raise _too_large(path, f"more than {JSON_LIMIT / 2**30:.1f} GiB")
    if _parsed_size(data) > available_memory(torch.device("cpu")):
        raise _too_large(path, f"{len(data) / 2**30:.1f} GiB")
    size, text = len(data), _decode(path, data).removeprefix("\ufeff")
    del data
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        raise _broken_json(path, text, size, error) from None
    except RecursionError:
        raise refusal(path, "is nested too deeply", "Write rows as flat objects, or lists of turns in them") from None
    return enumerate(_list_of_rows(path, value, is_row), start=1)


def _parsed_size(data: bytes) -> int:
    """An upper bound in bytes on a JSON text decoded and parsed into Python values (23 times its size if all lists)."""
    texts = (2 if data.isascii() else 5) * len(data)
    values = sum(data.count(mark) for mark in (b",", b":", b"[", b"{"))
    return texts + VALUE_BYTES * values + OBJECT_BYTES * data.count(b"{")


def _too_large(path: Path, size: str) -> DataError:
    source = shlex.quote(shown(path))
    unpack = {".gz": f"gzip -dc {source} | ", ".zst": f"zstd -dc {source} | "}.get(path.suffix.lower(), "")
    target = shlex.quote(shown(path.with_name(f"{path.name.partition('.')[0]}.jsonl")))
    jq = f"jq -cn --stream 'fromstream(1|truncate_stream(inputs))' {'' if unpack else f'{source} '}> {target}"
    what = f"is one JSON value of {size}, too large to load at once"
    return refusal(path, what, f"Convert it to JSON lines or Parquet: {unpack}{jq}")


def _is_cut(text: str, error: json.JSONDecodeError) -> bool:
    """Whether a JSON text is invalid only because it ends too early."""
    text = text.strip()
    if not text.startswith(("[", "{")):
        return False
    in_text = error.msg.startswith("Unterminated string") and not text.endswith(("]", "}"))
    in_word = len(error.doc) - error.pos <= 8 and not text.endswith(("]", "}"))
    return in_text or in_word or not error.doc[error.pos :].strip()


def _broken_json(path: Path, text: str, size: int, error: json.JSONDecodeError) -> DataError:
    if _is_cut(text, error):
        line = 1 + text.count("\n")
        what = f"ends in the middle of a JSON value, after {size} bytes (line {line})"
        return refusal(path, what, "The download may be incomplete: fetch it again")
    around = text[max(0, error.pos - 20) : error.pos + 20]
    what = f"is not JSON: {_reason(error)}, line {error.lineno}, column {error.colno}, near {around!r}"
    if error.msg == "Extra data":
        return refusal(path, what, "Put the rows into one list, [row, row], or one on each line of a .jsonl file")
    return refusal(path, what, _json_remedy(error, "Fix it there, or rewrite the file with a JSON library"))


def _json_remedy(error: json.JSONDecodeError, otherwise: str) -> str:
    for start, remedy in JSON_REMEDIES:
        if error.msg.startswith(start):
            return remedy
    return otherwise


def _reason(error: json.JSONDecodeError) -> str:
    return error.msg.removesuffix(" at").removesuffix(" starting").lower()


def _list_of_rows(path: Path, value: object, is_row: Callable[[Collection[str]], bool]) -> Sequence[object]:
    if isinstance(value, dict) and (columns := _columns_of(value, is_row(value))):
        return _rows_of_columns(path, columns)
    if isinstance(value, dict) and not is_row(value):
        lists = {name: inner for name, inner in value.items() if isinstance(inner, list)}
        if len(lists) > 1:
            what = f"is an object with several lists: {enumerated(lists)}"
            raise refusal(path, what, "Keep the list of rows only, or write each list to a file of its own")
        value = next(iter(lists.values()), [value])
    elif isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        remedy = 'Write a list of rows: [{"instruction": "...", "output": "..."}]'
        raise refusal(path, f"holds a single JSON {_kind_of_scalar(value)}, not a list of rows", remedy)
    if not value:
        raise refusal(path, "is an empty list", "Write rows into it, or download it again")
    return value


def _columns_of(value: Mapping[str, object], is_row: bool) -> dict[str, list[object]] | None:
    """The columns of an object that is a table: lists, or objects by row number as pandas writes them. None if not one.

    A list of turns is no column, because it holds objects. A single list is a column only if it is a field of a row.
    """
    objects = {name: inner for name, inner in value.items() if isinstance(inner, dict)}
    if len(value) > 1 and len(objects) == len(value):
        keys = next(iter(objects.values())).keys()
        if all(inner.keys() == keys for inner in objects.values()):
            return {name: list(inner.values()) for name, inner in objects.items()} if keys else None
    lists = {name: inner for name, inner in value.items() if isinstance(inner, list)}
    if not value or len(lists) < len(value):
        return None
    if not is_row and not columns_by_usual_name(USUAL_NAMES, value):
        return None
    if any(isinstance(cell, dict) for column in lists.values() for cell in column):
        return None
    if len(lists) == 1 and not (is_row and _is_column(*lists.items())):
        return None
    return lists


def _is_column(named: tuple[str, list[object]]) -> bool:
    """Whether an object's only list is a column. A column of conversations is a list of lists."""
    name, cells = named
    return bool(cells) and (name not in ("conversations", "messages") or all(isinstance(cell, list) for cell in cells))


def _rows_of_columns(path: Path, columns: dict[str, list[object]]) -> Sequence[object]:
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{excerpt(name)} {length}" for name, length in list(lengths.items())[:20])
        raise refusal(path, f"has columns of different lengths: {counts}", "Give every column a value for each row")
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    if not rows:
        raise refusal(path, "has columns without a row", "Write rows into it, or download it again")
    return rows


def _kind_of_scalar(value: object) -> str:
    return "null" if value is None else "string" if isinstance(value, str) else "number or truth value"


def _lines(path: Path) -> Iterator[str]:
    """The lines, with their line ends. Only a line feed ends a line; other separators stay inside texts."""
    with errors_named(path), opened(path) as file:
        number, offset = 1, 0
        while line := file.readline(LINE_LIMIT + 1):
            if len(line) > LINE_LIMIT:
                what = f"line {number} is longer than {LINE_LIMIT // 2**20} MiB"
                raise refusal(path, what, "Write one row a line, or check that this is a file of rows")
            text = _decode(path, line, offset, number)
            yield text.removeprefix("\ufeff") if number == 1 else text
            number, offset = number + 1, offset + len(line)


def _read_lines(path: Path) -> Iterator[Record]:
    for number, line in enumerate(_lines(path), start=1):
        if line.isspace():
            continue
        try:
            yield number, parse_json(line)
        except json.JSONDecodeError as error:
            yield number, _broken_line(line, error)
        except RecursionError:
            yield number, Flaw("", "is nested too deeply", "Write a flat object, or delete the line")


def _broken_line(line: str, error: json.JSONDecodeError) -> Flaw:
    if not line.endswith("\n") and _is_cut(line, error):
        what = f"ends in the middle of a JSON value, at column {len(line)}, the end of the file"
        return Flaw("", what, "The download may be incomplete: fetch it again, or delete this line")
    what = (
        f"is not JSON: {_reason(error)}, column {error.colno}, near {line[max(0, error.pos - 20) : error.pos + 20]!r}"
    )
    return Flaw("", what, _json_remedy(error, "Write each row as one JSON object on one line"))


def _read_table(path: Path, delimiter: str) -> Iterator[Record]:
    """The rows of a CSV or TSV file as dicts of strings."""
    reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            cells = _next_cells(reader)
        except csv.Error as error:
            if header is None:
                raise refusal(path, f"line {number}, the header: {_csv_reason(error)}", CSV_REMEDY) from None
            yield number, Flaw("", _csv_reason(error), CSV_REMEDY)
            continue
        if cells is None:
            break
        if not cells:
            continue
        if header is None:
            header = _header(path, cells, delimiter)
        else:
            yield number, _row_of_cells(header, cells, delimiter)


def _next_cells(reader: Iterator[list[str]]) -> list[str] | None:
    """The cells of the next row; None at the end.

    The limit on a cell's length is a setting of the whole process, so it is changed only while a row is read, and by
    one thread at a time. Raises csv.Error.
    """
    with _CSV_LOCK:
        before = csv.field_size_limit(LINE_LIMIT)
        try:
            return next(reader, None)
        finally:
            csv.field_size_limit(before)


def _csv_reason(error: csv.Error) -> str:
    text = str(error)
    if "unexpected end" in text:
        return "opens a quotation mark that is never closed"
    if "field larger" in text:
        return f"has a cell over {LINE_LIMIT // 2**20} MiB, or a quotation mark that is never closed"
    if "expected after" in text:
        return "has a quotation mark inside a quoted cell that is not doubled"
    if "new-line character" in text:
        return "has a carriage return outside of quotation marks"
    return f"is not CSV: {text}"


def _header(path: Path, cells: list[str], delimiter: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    other = next((mark for mark in (",", ";", "\t", "|") if mark != delimiter and mark in header[0]), None)
    if len(header) == 1 and other:
        what = f"has one column, {excerpt(header[0])}, which seems to be separated by {other!r}"
        raise refusal(path, what, "Save it with commas as .csv, or with tabs as .tsv")
    check_columns_differ(path, header)
    return header


def _row_of_cells(header: list[str], cells: list[str], delimiter: str) -> object:
    if len(cells) == len(header):
        return dict(zip(header, cells, strict=True))
    mark = "tabs" if delimiter == "\t" else "commas"
    more = len(cells) > len(header)
    remedy = (
        f"Put texts with {mark} between quotation marks"
        if more
        else f"Add the missing ones; empty cells are separated by {mark} too"
    )
    return Flaw("", f"has {len(cells)} cells where the header has {len(header)}", remedy)
