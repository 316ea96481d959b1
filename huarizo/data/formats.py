"""The formats of instruction data: how rows of each are recognised by their fields, and read as a conversation.

In goes one record (a JSON object, a line of a table); out come a system text and exchanges, or `Flaw`s with field, what
is wrong and the remedy. Texts are judged and never changed: what the file holds is what the model learns.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from huarizo.data.columnar import Opaque
from huarizo.data.files import enumerated, excerpt, printable
from huarizo.data.records import Doubled, Flaw, parse_json

ROLES = {
    **{"system": "system", "user": "user", "human": "user"},
    **{"assistant": "assistant", "gpt": "assistant"},
}
MISSING = object()


@dataclass(frozen=True, slots=True)
class Exchange:
    """One user turn and its answer. `input` is "" when absent."""

    instruction: str
    input: str
    output: str


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
            fields.flaw(f"{name}[{index}]", f"is {kind_of(pair)}, not a pair", "Write it as [instruction, output]")
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
    fields.flaw(fields.names[ours], f"is {kind_of(value)}{'' if value is MISSING else ', not a list'}", remedy)
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
                label, f"is {kind_of(value)}, not an object", f'Write it as {{"{role_key}": ..., "{text_key}": ...}}'
            )
            continue
        report_doubled(fields, value, f"{label}.")
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
        what = f"is {kind_of(value)}{'' if value is MISSING else ', not a known role'}"
        fields.flaw(label, what, f"Write one of {', '.join(ROLES)}")
    return role


def report_doubled(fields: Fields, value: object, prefix: str = "") -> None:
    if isinstance(value, Doubled):
        for name, count in value.repeated.items():
            fields.flaw(f"{prefix}{printable(name)}", f"stands {count} times in one object", "Keep one of them")


def _conversation(fields: Fields, turns: Sequence[Turn]) -> Conversation:
    """An optional system turn, then user and assistant in turn, the assistant last."""
    system = fields.optional("system")
    if fields.flaws:
        return "", ()
    if turns[0].role == "system":
        if system and system != turns[0].text:
            fields.flaw(fields.names["system"], "differs from the system turn", "Keep one of the two")
        if len(turns) == 1:
            fields.flaw(turns[0].label, "is a system turn and the only one", "Add a user turn and its answer")
        system, turns = turns[0].text, turns[1:]
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


def _question(fields: Fields) -> Conversation:
    return fields.optional("system"), (Exchange(fields.text("instruction"), fields.optional("input"), ""),)


def _prompt(fields: Fields) -> Conversation:
    return fields.optional("system"), (Exchange(fields.text("prompt"), "", ""),)


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
QUESTIONS = FORMATS | {
    "instructions": Format(("instruction",), ("input", "system"), _question),
    "prompts": Format(("prompt",), ("system",), _prompt),
}
"""The formats, and rows that have no answer."""
OUR_FIELDS = tuple(dict.fromkeys(name for each in FORMATS.values() for name in (*each.required, *each.optional)))
