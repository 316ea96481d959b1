"""Files of rows become conversations that can be trained on, and a list of what is wrong with the rest.

In goes a path: a JSON, JSON-lines, CSV or Parquet file, or a folder of them, in Alpaca, ShareGPT, messages or
prompt/completion format, detected by its fields. Out come `Row`s, texts kept byte for byte, and `Problem`s that name
file, row, field and remedy; all rows are judged before anything loads, so that a user mends all mistakes at once.
"""

import difflib
import itertools
import json
import math
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from huarizo.data.files import data_files, enumerated, excerpt, refusal, shown
from huarizo.data.records import Doubled, Flaw, Record, parse_json, read_records
from huarizo.errors import DataError, listed
from huarizo.files import write_whole

MAX_PROBLEMS = 10_000  # kept; further ones are only counted
MAX_LISTED = 20  # problems told in an error
PEEK = 1000  # rows whose fields decide on the format

ROLES = {
    **{"system": "system", "user": "user", "human": "user"},
    **{"assistant": "assistant", "gpt": "assistant"},
}
USUAL_NAMES = {  # of columns in the wild, for a suggested mapping
    "instruction": ("instruction", "question", "query", "prompt", "problem", "input", "text"),
    "output": ("output", "answer", "response", "completion", "reply", "solution", "target"),
}
MISSING = object()


@dataclass(frozen=True, slots=True)
class Exchange:
    """One user turn and its answer. `input` is "" when absent."""

    instruction: str
    input: str
    output: str


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation.

    file: as shown to the user; number: of the row, from 1, or of its first line in JSON-lines and CSV files;
    system: "" when absent; exchanges: at least one.
    """

    file: str
    number: int
    system: str
    exchanges: tuple[Exchange, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong in a row and how to mend it. `field` is "" where it is the row; places in lists count from 0."""

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
    """What was read. format: alpaca | sharegpt | messages | prompt-completion.

    problems: the first 10,000; problem_count and bad_row_count count all of them.
    """

    rows: list[Row]
    problems: list[Problem]
    format: str
    files: list[Path]
    problem_count: int = 0
    bad_row_count: int = 0


class Fields:
    """One record under our names; what is found wrong gathers in `flaws`."""

    __slots__ = ("flaws", "names", "record")

    def __init__(self, record: Mapping[str, object], names: Mapping[str, str]) -> None:
        self.record, self.names = record, names
        self.flaws: list[Flaw] = []

    def get(self, ours: str) -> object:
        name = self.names.get(ours)
        return MISSING if name is None else self.record.get(name, MISSING)

    def text(self, ours: str) -> str:
        return self.checked(self.names[ours], self.get(ours))

    def optional(self, ours: str) -> str:
        value = self.get(ours)
        return "" if value is None or value is MISSING else self.checked(self.names[ours], value, may_be_empty=True)

    def checked(self, label: str, value: object, may_be_empty: bool = False) -> str:
        """The value if it is a sound text; a flaw at `label` and "" otherwise."""
        wrong = _wrong_text(value, may_be_empty) if isinstance(value, str) else _not_a_text(value)
        if wrong:
            self.flaw(label, *wrong)
        return value if isinstance(value, str) else ""

    def flaw(self, label: str, what: str, remedy: str) -> None:
        self.flaws.append(Flaw(label, what, remedy))


def _wrong_text(text: str, may_be_empty: bool) -> tuple[str, str] | None:
    if not may_be_empty and (not text or text.isspace()):
        return f"is empty{' (only white space)' if text else ''}", "Write a text, or delete the row"
    if "\0" in text:
        return f"has a NUL character at position {text.index(chr(0))}", "Delete it (\\u0000) from the text"
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            half = f"\\u{ord(text[error.start]):04x}"
            return f"has half a character ({half}) at position {error.start}", "Write both halves, or delete it"
    return None


def _kind(value: object) -> str:
    """What a value that should be something else is, in the words of JSON."""
    if value is MISSING:
        return "missing"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "infinite, or too large a number"
    if isinstance(value, int | float):
        return f"a number ({str(value)[:40]})"
    if isinstance(value, str):
        return f"a text ({excerpt(value)})"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object ({enumerated(value, 4)})" if value else "an empty object"
    return f"of the type {type(value).__name__}"


def _not_a_text(value: object) -> tuple[str, str]:
    if isinstance(value, bool) or (isinstance(value, int | float) and math.isfinite(value)):
        remedy = f'Write it as a string: "{json.dumps(value)[:40]}"'
    elif isinstance(value, list | dict):
        remedy = "Write its text as one string"
    elif value is MISSING:
        remedy = "Add it, or delete the row"
    else:
        remedy = "Write a text, or delete the row"
    return f"is {_kind(value)}", remedy


Conversation = tuple[str, tuple[Exchange, ...]]  # system text, exchanges


def _alpaca(fields: Fields) -> Conversation:
    system = fields.optional("system")
    history = fields.get("history")
    earlier = () if history is None or history is MISSING or history == "" else _history(fields)
    last = Exchange(fields.text("instruction"), fields.optional("input"), fields.text("output"))
    return system, (*earlier, last)


def _history(fields: Fields) -> list[Exchange]:
    """Earlier exchanges of an Alpaca row: a list of [instruction, output]."""
    name = fields.names["history"]
    pairs = _list(fields, "history", 'Write a list of pairs: [["instruction", "output"]]')
    exchanges = []
    for index, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2:
            fields.flaw(f"{name}[{index}]", f"is {_kind(pair)}, not a pair", "Write it as [instruction, output]")
            continue
        texts = [fields.checked(f"{name}[{index}][{place}]", text) for place, text in enumerate(pair)]
        exchanges.append(Exchange(texts[0], "", texts[1]))
    return exchanges


def _list(fields: Fields, ours: str, remedy: str) -> list[object]:
    """A field's list. A text that holds a JSON list counts as one: in CSV there is no other way to write it."""
    value = fields.get(ours)
    if isinstance(value, str):
        try:
            inner = parse_json(value)
        except (ValueError, RecursionError):
            inner = None
        value = inner if isinstance(inner, list) else value
    if isinstance(value, list):
        return value
    fields.flaw(fields.names[ours], f"is {_kind(value)}{'' if value is MISSING else ', not a list'}", remedy)
    return []


class Turn(NamedTuple):
    label: str
    role: str
    text: str


def _turns(fields: Fields, ours: str, role_key: str = "role", text_key: str = "content") -> list[Turn]:
    """The sound turns of a list of {role, content} or {from, value}; the others leave flaws."""
    remedy = f'Write a list of {{"{role_key}": ..., "{text_key}": ...}} objects, the user first, the assistant last'
    before = len(fields.flaws)
    values = _list(fields, ours, remedy)
    name = fields.names[ours]
    if not values and len(fields.flaws) == before:
        fields.flaw(name, "is an empty list", remedy)
    turns = []
    for index, value in enumerate(values):
        label = f"{name}[{index}]"
        if not isinstance(value, dict):
            fields.flaw(
                label, f"is {_kind(value)}, not an object", f'Write it as {{"{role_key}": ..., "{text_key}": ...}}'
            )
            continue
        _report_doubled(fields, value, f"{label}.")
        role_name = role_key if role_key in value else next((key for key in ("role", "from") if key in value), role_key)
        text_name = (
            text_key if text_key in value else next((key for key in ("content", "value") if key in value), text_key)
        )
        role = _role(fields, f"{label}.{role_name}", value.get(role_name, MISSING))
        text = fields.checked(f"{label}.{text_name}", value.get(text_name, MISSING), may_be_empty=role == "system")
        turns.append(Turn(label, role, text))
    return turns


def _role(fields: Fields, label: str, value: object) -> str:
    role = ROLES.get(value, "") if isinstance(value, str) else ""
    if not role:
        what = f"is {_kind(value)}{'' if value is MISSING else ', not a known role'}"
        fields.flaw(label, what, f"Write one of {', '.join(ROLES)}")
    return role


def _report_doubled(fields: Fields, value: object, prefix: str = "") -> None:
    if isinstance(value, Doubled):
        for name, count in value.repeated.items():
            fields.flaw(f"{prefix}{name}", f"stands {count} times in one object", "Keep one of them")


def _conversation(fields: Fields, turns: Sequence[Turn]) -> Conversation:
    """An optional system turn, then user and assistant in turn, the assistant last."""
    system = fields.optional("system")
    if fields.flaws:
        return "", ()
    if turns[0].role == "system":
        if system and system != turns[0].text:
            fields.flaw(fields.names["system"], "differs from the system turn", "Keep one of the two")
        system = turns[0].text
        turns = turns[1:] or fields.flaw(turns[0].label, "is the only turn", "Add a user turn and its answer") or ()
    for index, turn in enumerate(turns):
        if turn.role != ("user", "assistant")[index % 2]:
            fields.flaw(turn.label, *_out_of_order(turn.role, index))
            return "", ()
    if len(turns) % 2:
        fields.flaw(
            turns[-1].label, "is a user turn without an answer", "Add the assistant's answer, or delete this turn"
        )
    pairs = zip(turns[::2], turns[1::2], strict=False)
    return system, tuple(Exchange(user.text, "", assistant.text) for user, assistant in pairs)


def _out_of_order(role: str, index: int) -> tuple[str, str]:
    if role == "system":
        return "is a system turn that is not the first turn", "Move it to the front, or delete it"
    if index == 0:
        return "is an assistant turn at the beginning", "Put the user's question before it, or delete it"
    return f"is a second {role} turn in a row", f"Join the two, or put the {_other(role)}'s turn between them"


def _other(role: str) -> str:
    return "assistant" if role == "user" else "user"


def _sharegpt(fields: Fields) -> Conversation:
    return _conversation(fields, _turns(fields, "conversations", "from", "value"))


def _messages(fields: Fields) -> Conversation:
    return _conversation(fields, _turns(fields, "messages"))


def _prompt_completion(fields: Fields) -> Conversation:
    if isinstance(fields.get("prompt"), list) or isinstance(fields.get("completion"), list):
        return _conversation(fields, [*_turns(fields, "prompt"), *_turns(fields, "completion")])
    return fields.optional("system"), (Exchange(fields.text("prompt"), "", fields.text("completion")),)


class Format(NamedTuple):
    """How rows of one format are recognised (`required`: all of them are there) and read."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Fields], Conversation]


FORMATS = {  # in the order in which they are tried
    "sharegpt": Format(("conversations",), ("system",), _sharegpt),
    "messages": Format(("messages",), ("system",), _messages),
    "alpaca": Format(("instruction", "output"), ("input", "system", "history"), _alpaca),
    "prompt-completion": Format(("prompt", "completion"), ("system",), _prompt_completion),
}
OUR_FIELDS = tuple(dict.fromkeys(name for each in FORMATS.values() for name in (*each.required, *each.optional)))


def _names(columns: Mapping[str, str]) -> dict[str, str]:
    """Our names -> those in the file. A column that another field is mapped to is no longer its own field."""
    taken = set(columns.values())
    return dict(columns) | {name: name for name in OUR_FIELDS if name not in columns and name not in taken}


def _fitting(fields: Collection[str], columns: Mapping[str, str]) -> str | None:
    """The format whose required fields are all there and that has all mapped fields."""
    names = _names(columns)
    for name, each in FORMATS.items():
        mapped = columns.keys() <= {*each.required, *each.optional}
        if mapped and all(names.get(required) in fields for required in each.required):
            return name
    return None


def _check_columns(columns: Mapping[str, str]) -> None:
    for name in columns:
        if name not in OUR_FIELDS:
            raise DataError(
                f"data.columns.{name}: Huarizo has no field of this name.{_near(name, OUR_FIELDS)} "
                f"The fields are: {', '.join(OUR_FIELDS)}."
            )


def _near(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {excerpt(close[0])}?" if close else ""


def _no_format(path: Path, fields: Collection[str], columns: Mapping[str, str]) -> DataError:
    for ours, name in columns.items():
        if name not in fields:
            what = f"has no column {excerpt(name)} (data.columns.{ours}).{_near(name, fields)}"
            return DataError(f"{shown(path)}: {what} The columns are: {enumerated(fields)}.")
    guesses = {ours: next((name for name in names if name in fields), None) for ours, names in USUAL_NAMES.items()}
    mapping = " ".join(
        shlex.quote(f"data.columns.{ours}={name}") for ours, name in guesses.items() if name and name != ours
    )
    if None in guesses.values() or not mapping:
        mapping = "data.columns.instruction=question data.columns.output=answer"
    known = "; ".join(f"{name}: {' and '.join(each.required)}" for name, each in FORMATS.items())
    return refusal(
        path,
        f"fits no format. Its fields are: {enumerated(fields)}. Needed are, for {known}",
        f"Rename the fields, or say which is which, like: {mapping}",
    )


@dataclass
class _Reading:
    """Rows and problems as they come in."""

    columns: Mapping[str, str]
    rows: list[Row] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    problem_count: int = 0
    bad_row_count: int = 0

    def file(self, path: Path) -> str:
        """Read one file and return its format."""
        wanted = _names(self.columns).values()
        records = read_records(path, frozenset(wanted), lambda fields: _fitting(fields, self.columns) is not None)
        first, fields = _peek(records)
        if not first:
            raise refusal(path, "has no rows", "Write rows into it, or leave it out")
        format = _fitting(fields, self.columns)
        if any(isinstance(value, dict) for _, value in first) and (
            format is None or not fields.keys() >= set(self.columns.values())
        ):
            raise _no_format(path, fields, self.columns)
        before = len(self.rows)
        names, shown_path = _names(self.columns), shown(path)
        for number, value in itertools.chain(first, records):
            self.record(shown_path, number, value, names, FORMATS[format or "alpaca"].read)
        if format is None:
            raise DataError(f"{shown_path}: has no row that can be read.\n{_told(self.problems, self.problem_count)}")
        assert len(self.rows) >= before
        return format

    def record(
        self, file: str, number: int, value: object, names: Mapping[str, str], read: Callable[[Fields], Conversation]
    ) -> None:
        if isinstance(value, dict):
            fields = Fields(value, names)
            _report_doubled(fields, value)
            system, exchanges = read(fields)
            if not fields.flaws:
                self.rows.append(Row(file, number, system, exchanges))
                return
            flaws = fields.flaws
        elif isinstance(value, Flaw):
            flaws = [value]
        else:
            remedy = 'Write an object: {"instruction": "...", "output": "..."}'
            flaws = [Flaw("", f"is {_kind(value)}, not an object", remedy)]
        self.bad_row_count += 1
        self.problem_count += len(flaws)
        room = max(0, MAX_PROBLEMS - len(self.problems))
        self.problems.extend(Problem(file, number, *flaw) for flaw in flaws[:room])


def _peek(records: Iterator[Record]) -> tuple[list[Record], dict[str, None]]:
    """Records up to the thousandth object, and the fields of these objects in the order in which they appear."""
    first: list[Record] = []
    fields: dict[str, None] = {}
    objects = 0
    for record in records:
        first.append(record)
        if isinstance(record[1], dict):
            fields |= dict.fromkeys(record[1])
            objects += 1
            if objects == PEEK:
                break
    return first, fields


def read_rows(path: Path, columns: Mapping[str, str] | None = None) -> Rows:
    """Read all rows of a file or folder. Bad rows become problems; nothing is said of them yet (see `require_good`).

    columns: our field name -> its name in the file, where they differ.

    Raises:
        DataError: a file can't be read at all, no format fits, the files of a folder differ in format, or `columns`
            names what is not there.
    """
    reading = _Reading(dict(columns or {}))
    _check_columns(reading.columns)
    files = data_files(Path(path))
    formats = [reading.file(file) for file in files]
    for file, format in zip(files, formats, strict=True):
        if format != formats[0]:
            what = f"is in {format} format, but {shown(files[0])} in {formats[0]}"
            raise refusal(file, what, "Put files of different formats into different folders")
    return Rows(reading.rows, reading.problems, formats[0], files, reading.problem_count, reading.bad_row_count)


def require_good(rows: Rows, on_bad_row: Literal["fail", "skip"]) -> list[Row]:
    """The good rows.

    Raises:
        DataError: there are bad rows and `on_bad_row` is fail, or no good row is left. The problems are listed.
    """
    if rows.rows and (on_bad_row == "skip" or not rows.problems):
        return rows.rows
    total = len(rows.rows) + rows.bad_row_count
    head = f"{rows.bad_row_count} of {total} rows can't be used:\n{_told(rows.problems, rows.problem_count)}\n"
    if not rows.rows:
        raise DataError(f"{head}No good row is left. Mend them in the file.")
    raise DataError(f"{head}Mend them in the file, or leave them out: data.on_bad_row=skip")


def _told(problems: Sequence[Problem], count: int) -> str:
    told = listed([str(problem) for problem in problems[:MAX_LISTED]])
    return told + (f"\n  ... and {count - MAX_LISTED} more" if count > MAX_LISTED else "")


def write_skipped(problems: Iterable[Problem], target: Path) -> None:
    """Write problems as JSON lines: file, row, field, what, remedy."""
    lines = []
    for problem in problems:
        values = asdict(problem)
        lines.append(
            json.dumps({"file": values.pop("file"), "row": values.pop("number"), **values}, ensure_ascii=False)
        )
    write_whole(target, "".join(f"{line}\n" for line in lines))
