"""Turns lists of messages into conversations: user turns, their answers, tool calls and tool results.

Input is turns in the usual shapes: {role, content}, {from, value} or plain strings. Output is a system text and
exchanges, each of which ends with an answer of the assistant. Turns that don't fit add flaws to the record's `Fields`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, NotRequired, TypedDict

from huarizo.data.fields import MISSING, Fields, kind_of, list_of, report_repeated_names
from huarizo.data.records import parse_json
from huarizo.wording import excerpt

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "ai", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}
WEIGHTS = ("weight", "loss_weight", "train", "train_on_turn", "loss")
THINKING = ("reasoning_content", "thinking", "reasoning")
TEXT_PARTS = ("text", "input_text", "output_text")
YES, NO = ("true", "yes", "1", "1.0"), ("false", "no", "0", "0.0")
OPEN_END = "the last turn has no answer and is left out"
ANSWER_FIRST = "the first turn is the assistant's and is left out"
NOTHING_LEARNT = "left out, because no turn is to be learnt"


@dataclass(frozen=True, slots=True)
class Exchange:
    """One user turn and its answer. `input` is "" if absent.

    learnt: whether the answer is learnt, or only read. calls: the tool calls of the answer, as a JSON list in OpenAI's
    shape with `arguments` as objects; "" if none. results: the results of tools, each a JSON message, which come before
    the user's text or instead of it. thinking: the assistant's reasoning before its answer, if the row has it in a
    field of its own; "" if not.
    """

    instruction: str
    input: str
    output: str
    learnt: bool = True
    calls: str = ""
    results: tuple[str, ...] = ()
    thinking: str = ""


class FunctionCall(TypedDict):
    """A function's name and its arguments, as an object or as its JSON text."""

    name: str
    arguments: dict[str, object] | str


class ToolCall(TypedDict):
    """A tool call in OpenAI's shape."""

    id: NotRequired[str]
    type: str
    function: FunctionCall


class Conversation(NamedTuple):
    """The content of a row: a conversation, or a plain `text`. tools: a JSON list in OpenAI's shape, or ""."""

    system: str = ""
    exchanges: tuple[Exchange, ...] = ()
    tools: str = ""
    text: str = ""


@dataclass(frozen=True)
class Turn:
    """One turn, with our name for its role.

    label: its place in the record, for messages. calls: the assistant's tool calls. results: tool messages as JSON.
    """

    label: str
    role: str
    text: str
    learnt: bool = True
    calls: tuple[ToolCall, ...] = ()
    results: tuple[str, ...] = ()
    thinking: str = ""


def turns_of(fields: Fields, ours: str, role_key: str = "role", text_key: str = "content") -> list[Turn]:
    """The valid turns of a list of {role, content} or {from, value} objects; the others add flaws."""
    remedy = f'Write a list of {{"{role_key}": ..., "{text_key}": ...}} objects, the user first, the assistant last'
    before = len(fields.flaws)
    values = list_of(fields, ours, remedy)
    name = fields.names[ours]
    if not values and len(fields.flaws) == before:
        fields.flaw(name, "is an empty list", remedy)
    if values and all(isinstance(value, str) for value in values):  # as in LIMA: user and assistant alternate
        texts = [fields.checked(f"{name}[{index}]", value) for index, value in enumerate(values)]
        return [Turn(f"{name}[{i}]", ("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    turns = []
    for index, value in enumerate(values):
        label = f"{name}[{index}]"
        if isinstance(value, dict):
            report_repeated_names(fields, value, f"{label}.")
            turns.append(_turn(fields, label, value, role_key, text_key))
        else:
            shape = f'Write it as {{"{role_key}": ..., "{text_key}": ...}}'
            fields.flaw(label, f"is {kind_of(value)}, not an object", shape)
    return turns


def _turn(fields: Fields, label: str, value: Mapping[str, object], role_key: str, text_key: str) -> Turn:
    role_name = role_key if role_key in value else next((key for key in ("role", "from") if key in value), role_key)
    text_name = text_key if text_key in value else next((k for k in ("content", "value") if k in value), text_key)
    role = _role(fields, f"{label}.{role_name}", value.get(role_name, MISSING))
    content, place = value.get(text_name, MISSING), f"{label}.{text_name}"
    calls = _calls(fields, label, value) if role == "assistant" else ()
    if role == "assistant" and calls and (content is None or content is MISSING):
        content = ""
    text = _content(fields, place, content, may_be_empty=role in ("system", "tool") or bool(calls))
    learnt = role not in ("assistant", "call") or _is_learnt(fields, label, value)
    if role == "call":
        return Turn(label, "assistant", "", learnt, _calls_in_text(fields, place, text))
    if role == "tool":
        message = {"role": "tool", "content": text}
        message |= {key: value[key] for key in ("tool_call_id", "name") if isinstance(value.get(key), str)}
        return Turn(label, role, text, results=(json.dumps(message, ensure_ascii=False),))
    thinking = _thinking(fields, label, value) if role == "assistant" else ""
    return Turn(label, role, text, learnt, calls, thinking=thinking)


def _thinking(fields: Fields, label: str, value: Mapping[str, object]) -> str:
    """The reasoning in a field beside the answer: the first of the THINKING fields that is not empty."""
    name = next((name for name in THINKING if value.get(name) not in (None, "")), None)
    return "" if name is None else fields.checked(f"{label}.{name}", value[name], may_be_empty=True)


def _role(fields: Fields, label: str, value: object) -> str:
    role = ROLES.get(value.strip().lower(), "") if isinstance(value, str) else ""
    if not role:
        what = f"is {kind_of(value)}{'' if value is MISSING else ', not a known role'}"
        fields.flaw(label, what, "Write one of system, user, assistant, tool, or a usual other name of these")
    return role


def _content(fields: Fields, label: str, value: object, may_be_empty: bool) -> str:
    """A text, or a list of text parts, joined with line breaks as servers do for text-only models."""
    if not isinstance(value, list) or not value:
        return fields.checked(label, value, may_be_empty)
    texts = []
    for index, part in enumerate(value):
        place = f"{label}[{index}]"
        if isinstance(part, dict) and (kind := part.get("type", "text")) not in TEXT_PARTS:
            what = f"is a part of type {excerpt(str(kind))}, not text"
            fields.flaw(place, what, "Only text can be trained on: write it as text, or delete the row")
        else:
            text = part.get("text", MISSING) if isinstance(part, dict) else part
            texts.append(fields.checked(place, text, may_be_empty=True))
    return fields.checked(label, "\n".join(texts), may_be_empty)


def truth_value(value: object) -> bool | None:
    """The meaning of a truth value, number or text; None if it means neither yes nor no."""
    if isinstance(value, bool | int | float):
        return bool(value) if value in (0, 1) else None
    text = value.strip().lower() if isinstance(value, str) else ""
    return True if text in YES else False if text in NO else None


def _is_learnt(fields: Fields, label: str, value: Mapping[str, object]) -> bool:
    """Whether a turn is learnt, by any of the WEIGHTS fields."""
    learnt = True
    for name in WEIGHTS:
        given = value.get(name)
        if given is None:
            continue
        if (weight := truth_value(given)) is None:
            fields.flaw(
                f"{label}.{name}",
                f"is {kind_of(given)}",
                "Write 1 for a turn that is learnt, or 0 for one that is only read",
            )
        learnt = learnt and weight is not False
    return learnt


def _calls(fields: Fields, label: str, value: Mapping[str, object]) -> tuple[ToolCall, ...]:
    """The tool calls of an assistant's turn: `tool_calls`, or the single `function_call` of older rows."""
    several, one = value.get("tool_calls"), value.get("function_call")
    if several is None and one is None:
        return ()
    found = [one] if several is None else several
    if not isinstance(found, list):
        fields.flaw(f"{label}.tool_calls", f"is {kind_of(found)}, not a list", 'Write [{"function": {...}}]')
        return ()
    name = "function_call" if several is None else "tool_calls"
    each = [_call(fields, f"{label}.{name}[{index}]", call) for index, call in enumerate(found)]
    return tuple(call for call in each if call is not None)


def _calls_in_text(fields: Fields, label: str, text: str) -> tuple[ToolCall, ...]:
    """The calls in the text of a turn that holds nothing else: a JSON object, or a list of them."""
    if not text:
        return ()
    value = _parsed(text)
    each = [_call(fields, label, call) for call in (value if isinstance(value, list) else [value])]
    return tuple(call for call in each if call is not None)


def _call(fields: Fields, label: str, value: object) -> ToolCall | None:
    """One call, with its arguments as an object, as chat templates expect it."""
    function = value.get("function", value) if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(value, dict) or not isinstance(function, dict) or not isinstance(name, str) or not name:
        fields.flaw(label, "is not a tool call", 'Write it as {"name": "...", "arguments": {...}}')
        return None
    arguments = function.get("arguments", {})
    arguments = _parsed(arguments or "{}") if isinstance(arguments, str) else arguments or {}
    if not isinstance(arguments, dict):
        fields.flaw(label, "has arguments that are not a JSON object", 'Write them as {"name": value}')
        return None
    call: ToolCall = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"id": value["id"], **call} if isinstance(value.get("id"), str) else call


def _parsed(text: str) -> object:
    """The value of a JSON text; MISSING if it is not JSON."""
    try:
        return parse_json(text)
    except (ValueError, RecursionError):
        return MISSING


def tools_of(fields: Fields) -> str:
    """The `tools` of a row (a list, or a JSON text of one) as JSON in OpenAI's shape; "" if none."""
    value = fields.get("tools")
    if value is None or value is MISSING or value in ("", []):
        return ""
    tools = list_of(fields, "tools", 'Write a list: [{"type": "function", "function": {...}}]')
    name = fields.names["tools"]
    found = []
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            remedy = 'Write it as {"type": "function", "function": {"name": "...", ...}}'
            fields.flaw(f"{name}[{index}]", "does not describe a tool", remedy)
            continue
        found.append({"type": "function", "function": function})
    return json.dumps(found, ensure_ascii=False) if found else ""


def conversation_of(fields: Fields, turns: Sequence[Turn]) -> Conversation:
    """A conversation from an optional system turn, then questions and the assistant's answers."""
    system, tools = fields.optional("system"), tools_of(fields)
    if fields.flaws:
        return Conversation()
    turns = _merge_same_role(fields, turns)
    if turns[0].role == "system":
        if system and system != turns[0].text:
            fields.flaw(fields.names["system"], "differs from the system turn", "Keep one of the two")
        if len(turns) == 1:
            fields.flaw(turns[0].label, "is a system turn and the only one", "Add a user turn and its answer")
        system, turns = turns[0].text, turns[1:]
    if len(turns) > 1 and turns[0].role == "assistant":  # it answers nothing, and no chat begins that way
        fields.notes.append(ANSWER_FIRST)
        turns = turns[1:]
    exchanges = _exchanges(fields, turns)
    if not fields.flaws and not any(exchange.learnt for exchange in exchanges):
        fields.left_out = NOTHING_LEARNT
    return Conversation(system, tuple(exchanges), tools)


def _merge_same_role(fields: Fields, turns: Sequence[Turn]) -> list[Turn]:
    """Merge consecutive turns of the same role, because most chat templates have no place for the second one.

    A blank line separates their texts, like paragraphs of one turn.
    """
    joined: list[Turn] = []
    for turn in turns:
        last = joined[-1] if joined else None
        if last is None or turn.role != last.role:
            joined.append(turn)
            continue
        if turn.learnt != last.learnt:
            what = f"is a second {turn.role} turn in a row, with another weight than the first"
            fields.flaw(turn.label, what, "Give both the same weight")
        if last.calls and turn.text:
            fields.flaw(turn.label, "follows a tool call without its result", "Put the tool's turn between them")
        text, thinking = (
            "\n\n".join(filter(None, texts)) for texts in ((last.text, turn.text), (last.thinking, turn.thinking))
        )
        calls, results = last.calls + turn.calls, last.results + turn.results
        joined[-1] = replace(last, text=text, calls=calls, results=results, thinking=thinking)
    return joined


def _exchanges(fields: Fields, turns: Sequence[Turn]) -> list[Exchange]:
    """Each answer with what comes before it: tool results, then the user's text."""
    exchanges: list[Exchange] = []
    asked: list[Turn] = []
    for turn in turns:
        if turn.role == "assistant" and asked:
            user = next((each.text for each in asked if each.role == "user"), "")
            results = next((each.results for each in asked if each.role == "tool"), ())
            calls = json.dumps(turn.calls, ensure_ascii=False) if turn.calls else ""
            exchanges.append(Exchange(user, "", turn.text, turn.learnt, calls, results, turn.thinking))
            asked = []
        elif problem := _out_of_order(turn.role, asked, exchanges):
            fields.flaw(turn.label, *problem)
            return []
        else:
            asked.append(turn)
    if asked and exchanges:
        fields.notes.append(OPEN_END)
    elif asked:
        remedy = "Add the assistant's answer, or delete this turn"
        fields.flaw(asked[-1].label, f"is a {asked[-1].role} turn without an answer", remedy)
    return exchanges


def _out_of_order(role: str, asked: Sequence[Turn], exchanges: Sequence[Exchange]) -> tuple[str, str] | None:
    """(problem, remedy) of a turn with this role after the turns `asked`; None if it may come here."""
    if role == "system":
        return "is a system turn that is not the first turn", "Move it to the front, or delete it"
    if role == "assistant":
        return "is an assistant turn at the beginning", "Put the user's question before it, or delete it"
    if role == "tool" and (asked or not exchanges or not exchanges[-1].calls):
        return "is a tool's turn without a call before it", "Put the assistant's tool_calls before it"
    return None
