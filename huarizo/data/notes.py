"""What a user should know of rows that can be trained on, each said once and with the rows' numbers.

In go columns, fields and rows as they are read; out come a few lines for the beginning of a run. None of it is an
error: a column may be left unused on purpose, and "None" may be an answer.
"""

import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from huarizo.wording import excerpt, printable

NO_INPUT = "<noinput>"  # as Stanford's self-instruct data writes an empty input
NO_TEXTS = frozenset({"nan", "NaN", "None", "null", "NULL", "<NA>"})  # what an absent value becomes in a table
MAX_PLACES = 10  # rows named in a note

USUAL_NAMES = {  # of columns in the wild, in lower case, for a suggested mapping
    "instruction": ("instruction", "question", "query", "prompt", "problem", "input", "text"),
    "output": ("output", "answer", "response", "completion", "reply", "solution", "target"),
    "input": ("input", "context"),
    "system": ("system", "system_prompt", "system_message"),
    "messages": ("messages", "conversation", "dialog", "dialogue", "chat", "turns"),
}


def usual(wanted: Iterable[str], columns: Collection[str]) -> dict[str, str]:
    """Our names, of those that are wanted, -> the columns whose usual names say that they mean the same."""
    free = {name.strip().lower(): name for name in reversed(list(columns))}
    found: dict[str, str] = {}
    for ours in wanted:
        name = next((name for name in USUAL_NAMES.get(ours, ()) if name in free), None)
        if name is not None:
            found[ours] = free.pop(name)
    return found


@dataclass
class Places:
    """Rows in which the same thing was met."""

    count: int = 0
    first: dict[str, list[int]] = field(default_factory=dict)
    """File -> row numbers, of the first MAX_PLACES rows."""

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
    """What was met while rows were read. said: what some rows do -> these rows."""

    said: dict[str, Places] = field(default_factory=dict)
    unused: dict[str, None] = field(default_factory=dict)
    mapping: dict[str, str] = field(default_factory=dict)
    no_input: Places = field(default_factory=Places)
    no_text: Places = field(default_factory=Places)

    def columns(self, columns: Collection[str], used: Collection[str], could: Iterable[str]) -> None:
        """A file's columns, those that its format reads, and the fields of the format that it has no column for."""
        unused = [name for name in columns if name not in used]
        self.unused |= dict.fromkeys(unused)
        self.mapping |= usual(could, unused)

    def row(self, file: str, number: int, record: Mapping[str, object], names: Collection[str]) -> None:
        """A row of which the fields `names` are read."""
        for name in names:
            value = record.get(name)
            if value and any(len(text) <= 8 and text.strip() in NO_TEXTS for text in _texts(value)):
                self.no_text.add(file, number)
                return

    def say(self, what: str, file: str, number: int) -> None:
        self.said.setdefault(what, Places()).add(file, number)

    def sentences(self) -> list[str]:
        notes = []
        if self.unused:
            names = [printable(name) or excerpt(name) for name in self.unused]
            more = f" and {len(names) - 20} more" if len(names) > 20 else ""
            hint = f"; to use what is there: {mapped(self.mapping)}" if self.mapping else ""
            notes.append(f"not used: {', '.join(names[:20])}{more}{hint}")
        if self.no_input.count:
            notes.append(f"{NO_INPUT} is read as no input in {_rows(self.no_input)}")
        if self.no_text.count:
            notes.append(
                f'"nan", "None" or "null" is a whole text, learnt as it stands, in {_rows(self.no_text)}. '
                "Delete these rows if it means that there was no text"
            )
        return notes + [f"{_rows(places)}: {what}" for what, places in self.said.items()]


def _rows(places: Places) -> str:
    return f"{places.count} row{'s' if places.count > 1 else ''} ({places})"


def mapped(columns: Mapping[str, str]) -> str:
    """Overrides that map columns, as a shell takes them."""
    return " ".join(shlex.quote(f"data.columns.{ours}={printable(name)}") for ours, name in columns.items())


def _texts(value: object) -> Sequence[str]:
    """The texts of a field: itself, or those of its turns."""
    if isinstance(value, str):
        return (value,)
    turns = [turn for turn in value if isinstance(turn, dict)] if isinstance(value, list) else []
    return [text for turn in turns for key in ("content", "value") if isinstance(text := turn.get(key), str)]
