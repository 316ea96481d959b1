"""Collects notes on rows that can be trained on: each is printed once, with the numbers of its rows.

Input is columns, fields and rows as they are read; output is a few lines for the start of a run. None of them is an
error: a column may be unused on purpose, and "None" may be an answer.
"""

import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from huarizo.wording import excerpt, printable

NO_INPUT = "<noinput>"  # how Stanford's self-instruct data writes an empty input
NO_TEXTS = frozenset({"nan", "NaN", "None", "null", "NULL", "<NA>"})  # how tables write a missing value
MAX_PLACES = 10  # rows named in a note

USUAL_NAMES = {  # our field -> names that data sets use for it, in lower case; for a suggested mapping
    "instruction": ("instruction", "question", "query", "prompt", "problem", "input", "text"),
    "output": ("output", "answer", "response", "completion", "reply", "solution", "target"),
    "input": ("input", "context"),
    "system": ("system", "system_prompt", "system_message"),
    "messages": ("messages", "conversation", "dialog", "dialogue", "chat", "turns"),
}


def columns_by_usual_name(wanted: Iterable[str], columns: Collection[str]) -> dict[str, str]:
    """Of the wanted fields, our name -> the column with a usual name for that field. No column is used twice."""
    free = {name.strip().lower(): name for name in reversed(list(columns))}
    found: dict[str, str] = {}
    for ours in wanted:
        name = next((name for name in USUAL_NAMES.get(ours, ()) if name in free), None)
        if name is not None:
            found[ours] = free.pop(name)
    return found


@dataclass
class Places:
    """The rows to which a note applies; `first` names some of them."""

    count: int = 0
    first: dict[str, list[int]] = field(default_factory=dict)
    """File -> row numbers, for the first MAX_PLACES rows."""

    def add(self, file: str, number: int) -> None:
        self.count += 1
        if self.count <= MAX_PLACES:
            self.first.setdefault(file, []).append(number)

    def __str__(self) -> str:
        named = "; ".join(
            f"{file}, row{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
            for file, numbers in self.first.items()
        )
        return named + (f" and {self.count - MAX_PLACES} more" if self.count > MAX_PLACES else "")


@dataclass
class Notes:
    """What was noticed while rows were read.

    remarks: text of a note -> its rows. unused: columns, in order. mapping: our field -> an unused column for it.
    """

    remarks: dict[str, Places] = field(default_factory=dict)
    unused: dict[str, None] = field(default_factory=dict)
    mapping: dict[str, str] = field(default_factory=dict)
    no_input: Places = field(default_factory=Places)
    no_text: Places = field(default_factory=Places)

    def add_columns(self, columns: Collection[str], used: Collection[str], absent: Iterable[str]) -> None:
        """A file's columns, those that its format reads, and the format's fields that have no column."""
        unused = [name for name in columns if name not in used]
        self.unused |= dict.fromkeys(unused)
        self.mapping |= columns_by_usual_name(absent, unused)

    def add_row(self, file: str, number: int, record: Mapping[str, object], names: Collection[str]) -> None:
        """A row, and the names of its fields that are read."""
        for name in names:
            value = record.get(name)
            if value and any(len(text) <= 8 and text.strip() in NO_TEXTS for text in _texts(value)):
                self.no_text.add(file, number)
                return

    def add_remark(self, text: str, file: str, number: int) -> None:
        self.remarks.setdefault(text, Places()).add(file, number)

    def lines(self) -> list[str]:
        """All notes, a line each."""
        notes = []
        if self.unused:
            names = [printable(name) or excerpt(name) for name in self.unused]
            more = f" and {len(names) - 20} more" if len(names) > 20 else ""
            hint = f"; to use them: {column_overrides(self.mapping)}" if self.mapping else ""
            notes.append(f"not used: {', '.join(names[:20])}{more}{hint}")
        if self.no_input.count:
            notes.append(f"{NO_INPUT} is read as no input in {_rows(self.no_input)}")
        if self.no_text.count:
            notes.append(
                f'"nan", "None" or "null" is a whole text, and is learnt as written, in {_rows(self.no_text)}. '
                "Delete these rows if it means that the text is missing"
            )
        return notes + [f"{_rows(places)}: {what}" for what, places in self.remarks.items()]


def _rows(places: Places) -> str:
    return f"{places.count} row{'s' if places.count > 1 else ''} ({places})"


def column_overrides(columns: Mapping[str, str]) -> str:
    """Overrides that map columns, quoted for a shell."""
    return " ".join(shlex.quote(f"data.columns.{ours}={printable(name)}") for ours, name in columns.items())


def _texts(value: object) -> Sequence[str]:
    """The texts in a field: the value itself, or the texts of its turns."""
    if isinstance(value, str):
        return (value,)
    turns = [turn for turn in value if isinstance(turn, dict)] if isinstance(value, list) else []
    return [text for turn in turns for key in ("content", "value") if isinstance(text := turn.get(key), str)]
