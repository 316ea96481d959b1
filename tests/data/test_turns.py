"""Turns in their usual shapes become exchanges; turns of weight 0 are read and not learnt."""

import json
from pathlib import Path
from typing import Any

import pytest

from huarizo.data.rows import read_rows, require_good
from huarizo.data.turns import Exchange
from huarizo.errors import DataError
from tests.data.encoding import TINY, learnt_of_row
from tests.data.reading import (
    ANSWER,
    CALL,
    OPENAI,
    SHAREGPT,
    USER,
    complaint_about,
    conversations,
    exchanges,
    in_full,
    read,
    write,
)

# Name, the messages of the second row, the message after "a.json, row 2, field 'messages".
TURNS = [
    ("turns null", "null", "': is null, not a list. <LIST>"),
    ("turns text", '"Q"', "': is a text ('Q'), not a list. <LIST>"),
    ("turns object", "<U>", "': is an object ('role', 'content'), not a list. <LIST>"),
    ("turns empty", "[]", "': is an empty list. <LIST>"),
    ("turn text", '["Q", <A>]', '[0]\': is a text (\'Q\'), not an object. Write it as {"role": ..., "content": ...}.'),
    ("turn null", "[<U>, null]", '[1]\': is null, not an object. Write it as {"role": ..., "content": ...}.'),
    ("no role", '[{"content": "Q"}, <A>]', "[0].role': is missing. <ROLES>"),
    ("no content", '[<U>, {"role": "assistant"}]', "[1].content': is missing. Add it, or delete the row."),
    (
        "null content",
        '[<U>, {"role": "assistant", "content": null}]',
        "[1].content': is null. Write a text, or delete the row.",
    ),
    (
        "content parts",
        '[{"role": "user", "content": [{"type": "text", "text": "Q"}, {"type": "image_url", "image_url": {}}]}, <A>]',
        "[0].content[1]': is a part of type 'image_url', not text. Only text can be trained on: write it as text, "
        "or delete the row.",
    ),
    (
        "empty content",
        '[<U>, {"role": "assistant", "content": ""}]',
        "[1].content': is empty. Write a text, or delete the row.",
    ),
    (
        "unknown role",
        '[{"role": "narrator", "content": "Q"}, <A>]',
        "[0].role': is a text ('narrator'), not a known role. <ROLES>",
    ),
    (
        "number role",
        '[{"role": 1, "content": "Q"}, <A>]',
        "[0].role': is a number (1), not a known role. <ROLES>",
    ),
    (
        "no answer",
        "[<S>, <U>, <U>]",
        "[1]': is a user turn without an answer. Add the assistant's answer, or delete this turn.",
    ),
    (
        "late system",
        "[<U>, <A>, <S>, <U>, <A>]",
        "[2]': is a system turn that is not the first turn. Move it to the front, or delete it.",
    ),
    (
        "two weights",
        '[<U>, <A>, {"role": "assistant", "content": "A", "weight": 0}]',
        "[2]': is a second assistant turn in a row, with another weight than the first. Give both the same weight.",
    ),
    (
        "half a weight",
        '[<U>, {"role": "assistant", "content": "A", "weight": 0.5}]',
        "[1].weight': is a number (0.5). Write 1 for a turn that is learnt, or 0 for one that is only read.",
    ),
    (
        "train maybe",
        '[<U>, {"role": "assistant", "content": "A", "train": "maybe"}]',
        "[1].train': is a text ('maybe'). Write 1 for a turn that is learnt, or 0 for one that is only read.",
    ),
    (
        "tool first",
        '[{"role": "tool", "content": "Q"}, <A>]',
        "[0]': is a tool's turn without a call before it. Put the assistant's tool_calls before it.",
    ),
    (
        "no result",
        '[<U>, {"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f"}}]}, <A>]',
        "[2]': follows a tool call without its result. Put the tool's turn between them.",
    ),
    (
        "calls text",
        '[<U>, {"role": "assistant", "tool_calls": "f"}, <A>]',
        "[1].tool_calls': is a text ('f'), not a list. Write [{\"function\": {...}}].",
    ),
    (
        "arguments",
        '[<U>, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]}, <A>]',
        '[1].tool_calls[0]\': has arguments that are not a JSON object. Write them as {"name": value}.',
    ),
    (
        "call",
        '[<U>, {"role": "function_call", "content": "f(x)"}, <A>]',
        '[1].content\': is not a tool call. Write it as {"name": "...", "arguments": {...}}.',
    ),
    ("only system", "[<S>]", "[0]': is a system turn and the only one. Add a user turn and its answer."),
    (
        "turn twice",
        '[{"role": "user", "role": "user", "content": "Q"}, <A>]',
        "[0].role': occurs 2 times in one object. Keep one of them.",
    ),
]


@pytest.mark.parametrize(("bad", "expected"), [pytest.param(*case, id=name) for name, *case in TURNS])
def test_turns(tmp_path: Path, bad: str, expected: str) -> None:
    good = in_full('{"messages": [<U>, <A>]}')
    message = complaint_about(tmp_path / "a.json", f'[{good}, {{"messages": {in_full(bad)}}}]')
    assert f"\n  - a.json, row 2, field 'messages{in_full(expected)}\n" in message


# Name, a file of two rows the second of which is bad, the message.
BAD_ROWS = [
    ("turns missing", '[{"messages": [<U>, <A>]}, {"id": 1}]', "a.json, row 2, field 'messages': is missing. <LIST>"),
    (
        "tools",
        '[{"messages": [<U>, <A>]}, {"messages": [<U>, <A>], "tools": [{"type": "function"}]}]',
        "a.json, row 2, field 'tools[0]': does not describe a tool. Write it as "
        '{"type": "function", "function": {"name": "...", ...}}.',
    ),
    (
        "two systems",
        '[{"messages": [<U>, <A>]}, {"messages": [<S>, <U>, <A>], "system": "other"}]',
        "a.json, row 2, field 'system': differs from the system turn. Keep one of the two.",
    ),
    (
        "gpt first",
        '[{"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, '
        '{"conversations": [{"from": "gpt", "value": "A"}, {"from": "human", "value": "Q"}]}]',
        "a.json, row 2, field 'conversations[1]': is a user turn without an answer. Add the assistant's answer, or "
        "delete this turn.",
    ),
]


@pytest.mark.parametrize(("content", "expected"), [pytest.param(*case, id=name) for name, *case in BAD_ROWS])
def test_bad_turns_in_a_row(tmp_path: Path, content: str, expected: str) -> None:
    assert f"\n  - {in_full(expected)}\n" in complaint_about(tmp_path / "a.json", in_full(content))


def test_system_beside_the_turns_and_roles_mixed(tmp_path: Path) -> None:
    turns = [{"role": "human", "value": "Q"}, {"from": "assistant", "content": "A", "weight": 1}]
    for name in ("conversations", "messages"):
        rows = read_rows(write(tmp_path / "a.json", [{"id": "x", name: turns, "system": "S"}]))
        assert conversations(rows) == [("S", (Exchange("Q", "", "A"),))]


WEIGHTS = [
    ("weight", 0), ("weight", 0.0), ("weight", "0"), ("loss_weight", 0), ("train", False), ("train", "false"),
    ("train_on_turn", False), ("train_on_turn", "False"), ("train", "no"), ("loss", False),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WEIGHTS)
@pytest.mark.parametrize("prompt", ["alpaca", "stanford", "chat"])
def test_a_turn_of_weight_0_is_read_and_not_learnt(tmp_path: Path, name: str, value: object, prompt: str) -> None:
    wrong = {"role": "assistant", "content": "WRONG", name: value}
    right = {"role": "assistant", "content": "right", name: 1}
    (row,) = read(tmp_path, {"messages": [USER | {name: 0.5}, wrong, USER, right]}).rows
    assert learnt_of_row(row, prompt) == f"right{TINY.eos_token}"
    everything = learnt_of_row(row, prompt, "all")
    assert "WRONG" not in everything and "right" in everything and "Q" in everything


def test_weights_that_say_nothing_new_change_nothing(tmp_path: Path) -> None:
    for value in (None, 1, True, "true", "1", 1.0):
        assert exchanges(tmp_path, USER, ANSWER | {"weight": value, "train": None}) == (Exchange("Q", "", "A"),)


@pytest.mark.parametrize(
    ("user", "assistant", "system"),
    [("human", "gpt", "system"), ("User", "ASSISTANT", "developer"), ("user", "model", "system"),
     ("human", "chatgpt", "system"), ("prompter", "bot", "system")],
)  # fmt: skip
def test_roles_by_their_usual_names(tmp_path: Path, user: str, assistant: str, system: str) -> None:
    turns = [{"from": role, "value": text} for role, text in ((system, "S"), (user, "Q"), (assistant, "A"))]
    (row,) = read(tmp_path, {"conversations": turns}).rows
    assert (row.system, row.exchanges) == ("S", (Exchange("Q", "", "A"),))


def test_text_parts_and_turns_of_one_role_are_joined(tmp_path: Path) -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}, "three"]}
    assert exchanges(tmp_path, parts, ANSWER) == (Exchange("one\ntwo\nthree", "", "A"),)
    assert exchanges(tmp_path, USER, USER, ANSWER, ANSWER) == (Exchange("Q\n\nQ", "", "A\n\nA"),)


def test_open_ends_and_first_answers_are_left_out_with_a_note(tmp_path: Path) -> None:
    whole = {"messages": [USER, ANSWER]}
    rows = read(tmp_path, whole, {"messages": [USER, ANSWER, USER]}, {"messages": [ANSWER, USER, ANSWER]}, whole)
    assert [row.exchanges for row in require_good(rows, "fail")] == [(Exchange("Q", "", "A"),)] * 4
    assert len(rows.notes) == 2 and "row 2)" in rows.notes[0] and "row 3)" in rows.notes[1]


def test_lists_of_texts_are_user_and_assistant_in_turn(tmp_path: Path) -> None:
    rows = read(tmp_path, {"conversations": ["Q", "A"]}, {"conversations": ["Q", "A", "Q2", "A2"]})
    assert [len(row.exchanges) for row in require_good(rows, "fail")] == [1, 2]
    assert rows.rows[1].exchanges[1] == Exchange("Q2", "", "A2")


@pytest.mark.parametrize("record", [OPENAI, SHAREGPT], ids=["openai", "sharegpt"])
def test_tools_calls_and_results(tmp_path: Path, record: dict[str, Any]) -> None:
    (row,) = require_good(read(tmp_path, record), "fail")
    assert json.loads(row.tools) == OPENAI["tools"]
    first, second = row.exchanges
    (call,) = json.loads(first.calls)
    assert (first.instruction, first.output, call["function"]) == ("Weather?", "", CALL)
    assert (second.instruction, second.output) == ("", "21 C.")
    assert [json.loads(result)["content"] for result in second.results] == ['{"c": 21}']


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_thinking_beside_an_answer_is_read(tmp_path: Path, name: str) -> None:
    assert exchanges(tmp_path, USER, ANSWER | {name: "deep"})[0].thinking == "deep"
    for none in (None, ""):
        assert exchanges(tmp_path, USER, ANSWER | {name: none})[0].thinking == ""
    joined = exchanges(tmp_path, USER, ANSWER | {name: "a"}, ANSWER | {name: "b"})
    assert (joined[0].thinking, joined[0].output) == ("a\n\nb", "A\n\nA")
    with pytest.raises(DataError, match=rf"messages\[1\]\.{name}"):
        exchanges(tmp_path, USER, ANSWER | {name: 3})
