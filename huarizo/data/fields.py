"""One record's values, looked at field by field: what is no sound text is a `Flaw` with its place and the remedy.

Texts are judged and never changed: what the file holds is what the model learns.
"""

import json
import math
from collections.abc import Mapping

from huarizo.data.columnar import Opaque
from huarizo.data.records import Doubled, Flaw, parse_json
from huarizo.wording import enumerated, excerpt, printable

MISSING = object()


class Fields:
    """One record under our names; what is found wrong gathers in `flaws`, what is worth telling in `notes`.

    left_out: why a sound row is not trained on; "" where it is.
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
        """The value if it is a sound text; a flaw at `label` and "" otherwise."""
        wrong = _wrong_text(value, may_be_empty) if isinstance(value, str) else _not_a_text(value, may_be_empty)
        if wrong:
            self.flaw(label, *wrong)
        return value if isinstance(value, str) else ""

    def flaw(self, label: str, what: str, remedy: str) -> None:
        self.flaws.append(Flaw(label, what, remedy))


def _wrong_text(text: str, may_be_empty: bool) -> tuple[str, str] | None:
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
    return f"of the type {value.type if isinstance(value, Opaque) else type(value).__name__}"


def _not_a_text(value: object, may_be_empty: bool) -> tuple[str, str]:
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
    fields.flaw(fields.names[ours], f"is {kind_of(value)}{'' if value is MISSING else ', not a list'}", remedy)
    return []


def report_doubled(fields: Fields, value: object, prefix: str = "") -> None:
    if isinstance(value, Doubled):
        for name, count in value.repeated.items():
            fields.flaw(f"{prefix}{printable(name)}", f"stands {count} times in one object", "Keep one of them")
