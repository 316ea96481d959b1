"""Checks the values of one record, field by field. A value that is not valid text becomes a `Flaw` with a remedy.

Texts are checked but never changed: the model learns exactly what is in the file.
"""

import json
import math
from collections.abc import Mapping

from huarizo.data.columnar import Opaque
from huarizo.data.records import Flaw, RepeatedNames, parse_json
from huarizo.wording import enumerated, excerpt, printable

MISSING = object()


class Fields:
    """One record, accessed by our field names.

    names: our field name -> its name in the file. flaws: the problems found so far. notes: remarks for the user.
    left_out: why a valid row is not trained on; "" if it is.
    """

    __slots__ = ("flaws", "left_out", "names", "notes", "record")

    def __init__(self, record: Mapping[str, object], names: Mapping[str, str]) -> None:
        self.record, self.names = record, names
        self.flaws: list[Flaw] = []
        self.notes: list[str] = []
        self.left_out = ""

    def get(self, ours: str) -> object:
        name = self.names.get(ours)
        return MISSING if name is None else self.record.get(name, MISSING)

    def text(self, ours: str) -> str:
        return self.checked(self.names[ours], self.get(ours))

    def optional(self, ours: str) -> str:
        value = self.get(ours)
        return "" if value is None or value is MISSING else self.checked(self.names[ours], value, may_be_empty=True)

    def checked(self, label: str, value: object, may_be_empty: bool = False) -> str:
        """The value if it is a text, else "". Adds a flaw at `label` unless it is a valid text."""
        flaw = _flaw_of_text(value, may_be_empty) if isinstance(value, str) else _flaw_of_other(value, may_be_empty)
        if flaw:
            self.flaw(label, *flaw)
        return value if isinstance(value, str) else ""

    def flaw(self, label: str, what: str, remedy: str) -> None:
        self.flaws.append(Flaw(label, what, remedy))


def _flaw_of_text(text: str, may_be_empty: bool) -> tuple[str, str] | None:
    """(problem, remedy) of a text; None if it is valid."""
    if not may_be_empty and (not text or text.isspace()):
        return f"is empty{' (only white space)' if text else ''}", "Write a text, or delete the row"
    if "\0" in text:
        at = text.index("\0") + 1
        return f"has a NUL character (\\u0000) at character {at}", "Delete it from the text"
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            half = f"\\u{ord(text[error.start]):04x}"
            return f"has half a character ({half}) at character {error.start + 1}", "Write both halves, or delete it"
    return None


def kind_of(value: object) -> str:
    """What a value is, in the terms of JSON, for messages that say it should be something else."""
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
    return f"of the type {value.type if isinstance(value, Opaque) else type(value).__name__}"


def _flaw_of_other(value: object, may_be_empty: bool) -> tuple[str, str]:
    """(problem, remedy) of a value that should be a text and isn't."""
    if isinstance(value, bool) or (isinstance(value, int | float) and math.isfinite(value)):
        remedy = f'Write it as a string: "{json.dumps(value)[:40]}"'
    elif isinstance(value, list | dict):
        remedy = "Write its text as one string"
    elif value is MISSING:
        remedy = "Add it, or delete the row"
    else:
        remedy = 'Write a text, or "" for none' if may_be_empty else "Write a text, or delete the row"
    return f"is {kind_of(value)}", remedy


def list_of(fields: Fields, ours: str, remedy: str) -> list[object]:
    """The list in a field, or [] and a flaw. A JSON list in a text counts, as CSV has no other way to write one."""
    value = fields.get(ours)
    if isinstance(value, str):
        try:
            inner = parse_json(value)
        except (ValueError, RecursionError):
            inner = None
        value = inner if isinstance(inner, list) else value
    if isinstance(value, list):
        return value
    fields.flaw(fields.names[ours], f"is {kind_of(value)}{'' if value is MISSING else ', not a list'}", remedy)
    return []


def report_repeated_names(fields: Fields, value: object, prefix: str = "") -> None:
    """Add a flaw for each name that occurs more than once in a JSON object."""
    if isinstance(value, RepeatedNames):
        for name, count in value.repeated.items():
            fields.flaw(f"{prefix}{printable(name)}", f"occurs {count} times in one object", "Keep one of them")
