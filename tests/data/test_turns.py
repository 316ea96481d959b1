"""Turns in the shapes that people have become exchanges, and what is only to be read is not learnt."""

import json
from pathlib import Path
from typing import Any

import pytest

from huarizo.data.prompts import prompt_format
from huarizo.data.rows import Row, Rows, read_rows, require_good
from huarizo.data.tokens import IGNORED, Encoder
from huarizo.data.turns import Exchange
from huarizo.errors import DataError
from tests.tiny import make_tokenizer

TINY = make_tokenizer()
USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


def read(tmp_path: Path, *records: Any) -> Rows:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(records))
    return read_rows(file)


def exchanges(tmp_path: Path, *turns: Any) -> tuple[Exchange, ...]:
    (row,) = require_good(read(tmp_path, {"messages": turns}), "fail")
    return row.exchanges


def learnt(row: Row, name: str, labels: Any = "auto") -> str:
    encoder = Encoder(TINY, prompt_format(name, TINY), labels)
    (example,) = encoder.encode([row])
    assert example is not None
    return TINY.decode([label for label in example.labels if label != IGNORED])


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
    assert learnt(row, prompt) == f"right{TINY.eos_token}"
    everything = learnt(row, prompt, "all")
    assert "WRONG" not in everything and "right" in everything and "Q" in everything


def test_weights_that_say_nothing_new_change_nothing(tmp_path: Path) -> None:
    for value in (None, 1, True, "true", "1", 1.0):
        assert exchanges(tmp_path, USER, ANSWER | {"weight": value, "train": None}) == (Exchange("Q", "", "A"),)


def test_bad_answers_and_rows_without_a_learnt_turn_are_left_out_and_counted(tmp_path: Path) -> None:
    turns = {"messages": [USER, ANSWER]}
    unlearnt = {"messages": [USER, ANSWER | {"weight": 0}]}
    rows = read(
        tmp_path, turns | {"label": False}, turns | {"label": True}, turns | {"label": "False"}, unlearnt, turns
    )
    assert [row.number for row in require_good(rows, "fail")] == [2, 5]
    assert len(rows.notes) == 2
    assert "2 rows" in rows.notes[0] and "rows 1, 3)" in rows.notes[0] and "label: false" in rows.notes[0]
    assert "1 row " in rows.notes[1] and "row 4)" in rows.notes[1]
    kto = [{"prompt": "Q", "completion": "A", "label": label} for label in (True, False)]
    assert len(read(tmp_path, *kto).rows) == 1
    classes = [{"instruction": "Q", "output": "A", "label": label} for label in (0, 1)]
    assert len(read(tmp_path, *classes).rows) == 2  # a number is a class, not a verdict
    with pytest.raises(DataError, match="no row is left to train on"):
        require_good(read(tmp_path, kto[1]), "fail")


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


@pytest.mark.parametrize("prompt", ["alpaca", "chat"])
def test_a_text_is_trained_on_as_it_is(tmp_path: Path, prompt: str) -> None:
    texts = ["### Human: What is salt?### Assistant: Sodium chloride.", "<s>[INST] Hi [/INST] Hi. </s>"]
    rows = read(tmp_path, *({"text": text} for text in texts))
    assert rows.format == "text"
    assert [learnt(row, prompt) for row in rows.rows] == texts == [learnt(row, prompt, "all") for row in rows.rows]
    with pytest.raises(DataError, match=r"a.json, row 1, field 'text': .*data.labels=auto"):
        list(Encoder(TINY, prompt_format(prompt, TINY), "response").encode(rows.rows))


def test_a_texts_special_tokens_stand_once(tinyllama_tokenizer: Any) -> None:
    encoder = Encoder(tinyllama_tokenizer, prompt_format("alpaca", tinyllama_tokenizer))
    for text in ("<s> Hi </s>", "Hi </s>", "Hi"):
        (example,) = encoder.encode([Row("f", 1, "", (), text=text)])
        assert example is not None and example.input_ids == example.labels
        assert example.input_ids.count(1) == 1 and example.input_ids.count(2) == text.count("</s>")


CALL = {"name": "weather", "arguments": {"city": "Busan"}}
OPENAI = {
    "messages": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c1", "type": "function", "function": CALL | {"arguments": json.dumps(CALL["arguments"])}}]},
        {"role": "tool", "tool_call_id": "c1", "content": '{"c": 21}'},
        {"role": "assistant", "content": "21 C."},
    ],
    "tools": [{"type": "function", "function": {"name": "weather"}}],
}  # fmt: skip
SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "Weather?"}, {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": '{"c": 21}'}, {"from": "gpt", "value": "21 C."},
    ],
    "system": "", "tools": '[{"name": "weather"}]',
}  # fmt: skip


@pytest.mark.parametrize("record", [OPENAI, SHAREGPT], ids=["openai", "sharegpt"])
def test_tools_calls_and_results(tmp_path: Path, record: dict[str, Any]) -> None:
    (row,) = require_good(read(tmp_path, record), "fail")
    assert json.loads(row.tools) == OPENAI["tools"]
    first, second = row.exchanges
    (call,) = json.loads(first.calls)
    assert (first.instruction, first.output, call["function"]) == ("Weather?", "", CALL)
    assert (second.instruction, second.output) == ("", "21 C.")
    assert [json.loads(result)["content"] for result in second.results] == ['{"c": 21}']


@pytest.mark.parametrize("record", [OPENAI, SHAREGPT], ids=["openai", "sharegpt"])
@pytest.mark.parametrize("prompt", ["alpaca", "stanford", "{{ instruction }}{{ input }}", "chat"])
def test_rows_with_tools_are_refused_where_the_prompts_have_no_place_for_them(
    tmp_path: Path, record: dict[str, Any], prompt: str
) -> None:
    encoder = Encoder(TINY, prompt_format(prompt, TINY))
    with pytest.raises(DataError, match=r"a.json, row 1, field 'tools': .* tools"):
        list(encoder.encode(read(tmp_path, record).rows))


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_thinking_beside_an_answer_is_read(tmp_path: Path, name: str) -> None:
    assert exchanges(tmp_path, USER, ANSWER | {name: "deep"})[0].thinking == "deep"
    for none in (None, ""):
        assert exchanges(tmp_path, USER, ANSWER | {name: none})[0].thinking == ""
    joined = exchanges(tmp_path, USER, ANSWER | {name: "a"}, ANSWER | {name: "b"})
    assert (joined[0].thinking, joined[0].output) == ("a\n\nb", "A\n\nA")
    with pytest.raises(DataError, match=rf"messages\[1\]\.{name}"):
        exchanges(tmp_path, USER, ANSWER | {name: 3})


def test_answers_inside_a_prompt_are_read_and_not_learnt(tmp_path: Path) -> None:
    earlier = {"role": "assistant", "content": "EARLIER"}
    (row,) = read(tmp_path, {"prompt": [USER, earlier, USER], "completion": [ANSWER]}).rows
    assert [exchange.learnt for exchange in row.exchanges] == [False, True]
    assert learnt(row, "alpaca") == f"A{TINY.eos_token}"
