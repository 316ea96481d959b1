"""The formats of instruction data: the fields by which each is recognised, and how its rows are read.

Input is one record (a JSON object or a line of a table). Output is a `Conversation`, or `Flaw`s with field, problem and
remedy. Texts are checked but never changed: the model learns exactly what is in the file.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from huarizo.data.fields import MISSING, Fields, kind_of, list_of
from huarizo.data.turns import Conversation, Exchange, conversation_of, tools_of, turns_of

BAD_ANSWER = "left out, because the answer is marked as bad (label: false)"


def _alpaca(fields: Fields) -> Conversation:
    system = fields.optional("system")
    history = fields.get("history")
    earlier = () if history is None or history is MISSING or history == "" else _history(fields)
    last = Exchange(fields.text("instruction"), fields.optional("input"), fields.text("output"))
    return Conversation(system, (*earlier, last), tools_of(fields))


def _history(fields: Fields) -> list[Exchange]:
    """The earlier exchanges of an Alpaca row: a list of [instruction, output] pairs."""
    name = fields.names["history"]
    pairs = list_of(fields, "history", 'Write a list of pairs: [["instruction", "output"]]')
    exchanges = []
    for index, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2:
            fields.flaw(f"{name}[{index}]", f"is {kind_of(pair)}, not a pair", "Write it as [instruction, output]")
            continue
        texts = [fields.checked(f"{name}[{index}][{place}]", text) for place, text in enumerate(pair)]
        exchanges.append(Exchange(texts[0], "", texts[1]))
    return exchanges


def _sharegpt(fields: Fields) -> Conversation:
    return conversation_of(fields, turns_of(fields, "conversations", "from", "value"))


def _messages(fields: Fields) -> Conversation:
    return conversation_of(fields, turns_of(fields, "messages"))


def _prompt_completion(fields: Fields) -> Conversation:
    if isinstance(fields.get("prompt"), list) or isinstance(fields.get("completion"), list):
        read = [replace(turn, learnt=turn.role != "assistant") for turn in turns_of(fields, "prompt")]
        return conversation_of(fields, [*read, *turns_of(fields, "completion")])
    exchange = Exchange(fields.text("prompt"), "", fields.text("completion"))
    return Conversation(fields.optional("system"), (exchange,), tools_of(fields))


def _text(fields: Fields) -> Conversation:
    return Conversation(text=fields.text("text"))


def _question(fields: Fields) -> Conversation:
    return Conversation(
        fields.optional("system"), (Exchange(fields.text("instruction"), fields.optional("input"), ""),)
    )


def _prompt(fields: Fields) -> Conversation:
    return Conversation(fields.optional("system"), (Exchange(fields.text("prompt"), "", ""),))


class Format(NamedTuple):
    """One format: a row that has all `required` fields is in it. `read` makes a conversation of the row."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Fields], Conversation]


def read_row(fields: Fields, format: Format) -> Conversation:
    """Read a record as a conversation. Its flaws, its notes and whether it is left out are recorded in `fields`."""
    conversation = format.read(fields)
    label = fields.get("label")
    # In preference data (KTO) the label is a truth value. A number is some class, which says nothing about the answer.
    if label is False or (isinstance(label, str) and label.strip().lower() == "false"):
        fields.left_out = BAD_ANSWER
    return conversation


FORMATS = {  # in the order in which they are tried
    "sharegpt": Format(("conversations",), ("system", "tools", "label"), _sharegpt),
    "messages": Format(("messages",), ("system", "tools", "label"), _messages),
    "alpaca": Format(("instruction", "output"), ("input", "system", "history", "tools", "label"), _alpaca),
    "prompt-completion": Format(("prompt", "completion"), ("system", "tools", "label"), _prompt_completion),
    "text": Format(("text",), ("label",), _text),
}
QUESTIONS = FORMATS | {
    "instructions": Format(("instruction",), ("input", "system"), _question),
    "prompts": Format(("prompt",), ("system",), _prompt),
}
"""The formats above, and two of rows without an answer."""
OUR_FIELDS = tuple(dict.fromkeys(name for each in FORMATS.values() for name in (*each.required, *each.optional)))
