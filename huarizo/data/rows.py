"""Reads data files into conversations to train on, and a list of problems with the other rows.

Input is JSON, JSON-lines, CSV, Parquet or Arrow files, or folders of them, in Alpaca, ShareGPT, messages,
prompt/completion or text format, recognised by the fields. Output is `Row`s, with texts kept byte for byte, and
`Problem`s that name file, row, field and remedy. All rows are checked before a model loads, so that a user can fix all
mistakes at once.
"""

import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from huarizo.data.discovery import data_files, refusal
from huarizo.data.fields import Fields, kind_of, report_repeated_names
from huarizo.data.formats import FORMATS, OUR_FIELDS, Format, read_row
from huarizo.data.notes import NO_INPUT, Notes, column_overrides, columns_by_usual_name
from huarizo.data.records import Flaw, Record, read_records
from huarizo.data.turns import Exchange
from huarizo.errors import DataError
from huarizo.files import write_whole
from huarizo.hub.data_files import suffix_of
from huarizo.wording import did_you_mean, enumerated, excerpt, listed, shown

MAX_PROBLEMS = 10_000  # kept; further ones are only counted
MAX_LISTED = 20  # problems listed in an error
PEEK = 1000  # rows whose fields determine the format
MOST_COMPARED = 200  # columns compared with a name that none of them has


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation, or one plain text.

    file: as shown to the user. number: of the row, from 1; in JSON-lines and CSV files, of its first line.
    system: "" if absent. exchanges: at least one, unless there is a text. tools: a JSON list, "" if absent.
    text: trained on as it is; "" for a conversation.
    """

    file: str
    number: int
    system: str
    exchanges: tuple[Exchange, ...]
    tools: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a row and how to fix it. `field` is "" for the whole row; indices in lists start at 0."""

    file: str
    number: int
    field: str
    what: str
    remedy: str

    def __str__(self) -> str:
        place = f", field {self.field!r}" if self.field else ""
        return f"{self.file}, row {self.number}{place}: {self.what}. {self.remedy}."


@dataclass(frozen=True)
class Rows:
    """The result of reading files.

    format: alpaca | sharegpt | messages | prompt-completion | text, or several of them, separated by commas.
    notes: remarks on the rows that can be used.
    problems: the first 10,000; problem_count and bad_row_count count all of them.
    """

    rows: list[Row]
    problems: list[Problem]
    format: str
    files: list[Path]
    notes: list[str] = field(default_factory=list)
    problem_count: int = 0
    bad_row_count: int = 0


def _column_names(columns: Mapping[str, str]) -> dict[str, str]:
    """Our field name -> its name in the file. A column that another field is mapped to is no longer its own field."""
    taken = set(columns.values())
    return dict(columns) | {name: name for name in OUR_FIELDS if name not in columns and name not in taken}


def _matching_format(fields: Collection[str], columns: Mapping[str, str], formats: Mapping[str, Format]) -> str | None:
    """The first format that has all mapped fields and whose required fields are all present."""
    names = _column_names(columns)
    for name, each in formats.items():
        has_mapped = columns.keys() <= {*each.required, *each.optional}
        if has_mapped and all(names.get(required) in fields for required in each.required):
            return name
    return None


def _check_columns(columns: Mapping[str, str]) -> None:
    for name in columns:
        if name not in OUR_FIELDS:
            raise DataError(
                f"data.columns.{name}: Huarizo has no field of this name{did_you_mean(name, OUR_FIELDS) or '.'} "
                f"The fields are: {', '.join(OUR_FIELDS)}."
            )


def _no_format(path: Path, fields: Collection[str], columns: Mapping[str, str]) -> DataError:
    for ours, name in columns.items():
        if name not in fields:
            near = did_you_mean(name, list(fields)[:MOST_COMPARED]) or "."
            what = f"has no column {excerpt(name)} (data.columns.{ours}){near}"
            return DataError(f"{shown(path)}: {what} The columns are: {enumerated(fields)}.")
    overrides = _suggested_overrides(fields)
    header = "Name them in the first line" if suffix_of(path.name).startswith((".csv", ".tsv")) else "Rename the fields"
    known = "; ".join(f"{name}: {' and '.join(each.required)}" for name, each in FORMATS.items())
    return refusal(
        path,
        f"fits no format. Its fields are: {enumerated(fields)}. Required fields are, for {known}",
        f"{header}, or say which is which, like: {overrides}",
    )


def _suggested_overrides(fields: Collection[str]) -> str:
    """Overrides that would make these columns fit a format, or an example of such overrides."""
    guesses = columns_by_usual_name(("instruction", "output", "input", "system"), fields)
    if not guesses.keys() >= {"instruction", "output"}:
        turns = columns_by_usual_name(("messages", "system"), fields)
        guesses = turns if "messages" in turns else {}
    guesses = {ours: name for ours, name in guesses.items() if name != ours}
    return column_overrides(guesses or {"instruction": "question", "output": "answer"})


@dataclass
class _Reading:
    """Collects rows, notes and problems while files are read."""

    columns: Mapping[str, str]
    formats: Mapping[str, Format]
    rows: list[Row] = field(default_factory=list)
    notes: Notes = field(default_factory=Notes)
    problems: list[Problem] = field(default_factory=list)
    problem_count: int = 0
    bad_row_count: int = 0

    def read_file(self, path: Path) -> str:
        """Read one file. Returns the name of its format."""
        names = _column_names(self.columns)
        records = read_records(path, set(names.values()), lambda fields: self.format_of(fields) is not None)
        first, fields = _peek(records)
        if not first:
            raise refusal(path, "has no rows", "Write rows into it, or leave it out")
        file = shown(path)
        if fields is None:
            problems = [str(Problem(file, number, *_flaw_of_non_object(value))) for number, value in first[:MAX_LISTED]]
            raise DataError(f"{file}: has no row that can be read.\n{listed(problems, MAX_LISTED, len(first))}")
        format = self.format_of(fields)
        if format is None or not fields.keys() >= set(self.columns.values()):
            raise _no_format(path, fields, self.columns)
        chosen = self.formats[format]
        ours = (*chosen.required, *chosen.optional)
        used = [names[each] for each in ours if each in names]
        self.notes.add_columns(fields, used, [each for each in ours if names.get(each) not in fields])
        for number, value in itertools.chain(first, records):
            if isinstance(value, dict):
                value = self.replace_no_input(file, number, value, names.get("input"))
                self.notes.add_row(file, number, value, used)
            self.add_record(file, number, value, names, chosen)
        return format

    def replace_no_input(
        self, file: str, number: int, record: dict[str, object], name: str | None
    ) -> dict[str, object]:
        """The record, with an input of `<noinput>` replaced by "" and noted."""
        text = record.get(name) if name is not None else None
        if name is None or not isinstance(text, str) or text.strip().lower() != NO_INPUT:
            return record
        self.notes.no_input.add(file, number)
        record[name] = ""
        return record

    def format_of(self, fields: Collection[str]) -> str | None:
        return _matching_format(fields, self.columns, self.formats)

    def add_record(self, file: str, number: int, value: object, names: Mapping[str, str], format: Format) -> None:
        """One record becomes a row, is left out with a note, or adds problems."""
        if isinstance(value, dict):
            fields = Fields(value, names)
            report_repeated_names(fields, value)
            conversation = read_row(fields, format)
            if fields.left_out:
                self.notes.add_remark(fields.left_out, file, number)
                return
            if not fields.flaws:
                self.rows.append(Row(file, number, *conversation))
                for note in fields.notes:
                    self.notes.add_remark(note, file, number)
                return
            flaws = fields.flaws
        else:
            flaws = [_flaw_of_non_object(value)]
        self.bad_row_count += 1
        self.problem_count += len(flaws)
        room = max(0, MAX_PROBLEMS - len(self.problems))
        self.problems.extend(Problem(file, number, *flaw) for flaw in flaws[:room])


def _flaw_of_non_object(value: object) -> Flaw:
    if isinstance(value, Flaw):
        return value
    return Flaw("", f"is {kind_of(value)}, not an object", 'Write an object: {"instruction": "...", "output": "..."}')


def _peek(records: Iterator[Record]) -> tuple[list[Record], dict[str, None] | None]:
    """The first records, and the field names of the objects among them, in order; None if there is no object."""
    first: list[Record] = []
    fields: dict[str, None] | None = None
    objects = 0
    for record in records:
        first.append(record)
        if isinstance(record[1], dict):
            fields = {} if fields is None else fields
            fields |= dict.fromkeys(record[1])
            objects += 1
        if objects == PEEK or len(first) == MAX_PROBLEMS:
            break
    return first, fields


def read_rows(
    path: Path | Sequence[Path], columns: Mapping[str, str] | None = None, formats: Mapping[str, Format] = FORMATS
) -> Rows:
    """Read all rows of one or more files or folders, each file in its own format.

    Bad rows become problems; call `require_good` to refuse them.

    Args:
        path: files and folders.
        columns: our field name -> its name in the file, for those that differ.
        formats: the formats to recognise; `QUESTIONS` also accepts rows without an answer.

    Raises:
        DataError: a file can't be read at all, no format fits it, or `columns` names a field or column that doesn't
            exist.
    """
    reading = _Reading(dict(columns or {}), formats)
    _check_columns(reading.columns)
    paths = [path] if isinstance(path, Path) else path
    files = [file for each in paths for file in data_files(each)]
    found = dict.fromkeys(reading.read_file(file) for file in files)
    return Rows(
        reading.rows, reading.problems, ", ".join(found), files,
        reading.notes.lines(), reading.problem_count, reading.bad_row_count,
    )  # fmt: skip


def require_good(rows: Rows, on_bad_row: Literal["fail", "skip"]) -> list[Row]:
    """The good rows.

    Raises:
        DataError: there are bad rows and `on_bad_row` is "fail", or no good row is left. It lists the problems.
    """
    if rows.rows and (on_bad_row == "skip" or not rows.problems):
        return rows.rows
    if not rows.problems:
        raise DataError("no row is left to train on: " + "; ".join(rows.notes))
    total = len(rows.rows) + rows.bad_row_count
    problems = [str(problem) for problem in rows.problems[:MAX_LISTED]]
    head = f"{rows.bad_row_count} of {total} rows can't be used:\n{listed(problems, MAX_LISTED, rows.problem_count)}\n"
    if not rows.rows:
        raise DataError(f"{head}No good row is left. Fix them in the file.")
    raise DataError(f"{head}Fix them in the file, or leave them out: data.on_bad_row=skip")


def write_skipped(problems: Iterable[Problem], target: Path) -> None:
    """Write problems as JSON lines with the keys file, row, field, what and remedy."""
    lines = []
    for problem in problems:
        values = asdict(problem)
        values = {"file": values.pop("file"), "row": values.pop("number"), **values}
        lines.append(json.dumps(values, ensure_ascii=False) + "\n")
    write_whole(target, "".join(lines).encode("utf-8", "backslashreplace"))
