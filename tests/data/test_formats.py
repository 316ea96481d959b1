"""Every format in every container is read to the same rows, and a bad row of each is reported."""

from pathlib import Path

import pytest

from huarizo.data.formats import QUESTIONS
from huarizo.data.rows import read_rows, require_good
from huarizo.data.turns import Exchange
from huarizo.errors import DataError
from tests.data.encoding import TINY, learnt_of_row
from tests.data.reading import (
    ANSWER,
    GOOD,
    KOREAN,
    SUFFIXES,
    USER,
    complaint_about,
    conversations,
    in_full,
    read,
    write,
)

TURNS = [
    ("system", "간결하게"),
    ("user", "안녕?"),
    ("assistant", "네\r\n안녕하세요 🦙"),
    ("user", " Q2\t"),
    ("assistant", "A2\n"),
]


RECORDS = {
    "alpaca": {
        "instruction": " Q2\t",
        "input": "",
        "output": "A2\n",
        "system": "간결하게",
        "history": [["안녕?", "네\r\n안녕하세요 🦙"]],
    },
    "sharegpt": {
        "conversations": [
            {"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": text} for role, text in TURNS
        ]
    },
    "messages": {"messages": [{"role": role, "content": text} for role, text in TURNS]},
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("format", RECORDS)
def test_multi_turn_in_every_container(tmp_path: Path, format: str, suffix: str) -> None:
    rows = read_rows(write(tmp_path / f"a{suffix}", [RECORDS[format]] * 3))
    exchanges = (Exchange("안녕?", "", "네\r\n안녕하세요 🦙"), Exchange(" Q2\t", "", "A2\n"))
    assert conversations(rows) == [("간결하게", exchanges)] * 3
    assert (rows.format, rows.files, rows.problem_count) == (format, [tmp_path / f"a{suffix}"], 0)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_single_turn_in_every_container(tmp_path: Path, suffix: str) -> None:
    alpaca = [
        {"instruction": KOREAN, "input": "x", "output": "Y", "id": 1},
        {"instruction": "Q", "input": "", "output": "A", "id": 2},
    ]
    expected = [("", (Exchange(KOREAN, "x", "Y"),)), ("", (Exchange("Q", "", "A"),))]
    assert conversations(read_rows(write(tmp_path / f"a{suffix}", alpaca))) == expected
    prompts = [{"prompt": KOREAN, "completion": "Y", "system": "S"}]
    rows = read_rows(write(tmp_path / f"b{suffix}", prompts))
    assert (rows.format, conversations(rows)) == ("prompt-completion", [("S", (Exchange(KOREAN, "", "Y"),))])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_without_an_answer_are_taken_where_they_are_asked_for(tmp_path: Path, suffix: str) -> None:
    asked = write(tmp_path / f"a{suffix}", [{"instruction": KOREAN, "input": "x", "system": "S", "id": 1}])
    prompts = write(tmp_path / f"b{suffix}", [{"prompt": KOREAN, "system": "S", "base": "x", "tuned": "y"}])
    for path, format, input in ((asked, "instructions", "x"), (prompts, "prompts", "")):
        rows = read_rows(path, formats=QUESTIONS)
        assert (rows.format, conversations(rows)) == (format, [("S", (Exchange(KOREAN, input, ""),))])
        with pytest.raises(DataError):
            read_rows(path)
    whole = write(tmp_path / f"c{suffix}", [{"instruction": "Q", "input": "", "output": "A"}])
    assert read_rows(whole, formats=QUESTIONS) == read_rows(whole)
    named = write(tmp_path / f"d{suffix}", [{"question": "Q"}])
    assert conversations(read_rows(named, {"instruction": "question"}, QUESTIONS)) == [("", (Exchange("Q", "", ""),))]


def test_absent_and_null_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(
        '[{"instruction": "Q", "output": "A"}, {"instruction": "Q", "input": null, "output": "A", "history": []},'
        '{"instruction": "Q", "output": "A", "system": null, "history": null, "extra": {"a": [NaN]}}]'
    )
    assert conversations(read_rows(path)) == [("", (Exchange("Q", "", "A"),))] * 3


def test_prompt_and_completion_as_messages(tmp_path: Path) -> None:
    user, answer = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    record = {"prompt": [{"role": "system", "content": "S"}, user, answer, user], "completion": [answer]}
    rows = read_rows(write(tmp_path / "a.parquet", [record]))
    assert conversations(rows) == [("S", (Exchange("Q", "", "A", learnt=False), Exchange("Q", "", "A")))]


# Name, the second of three rows, the message after "a.json, row 2".
HISTORIES = [
    (
        "history text",
        '{"instruction": "Q", "output": "A", "history": "before"}',
        ", field 'history': is a text ('before'), not a list. Write a list of pairs: [[\"instruction\", \"output\"]].",
    ),
    (
        "history single",
        '{"instruction": "Q", "output": "A", "history": [["q"]]}',
        ", field 'history[0]': is a list of 1, not a pair. Write it as [instruction, output].",
    ),
    (
        "history null",
        '{"instruction": "Q", "output": "A", "history": [["q", null]]}',
        ", field 'history[0][1]': is null. Write a text, or delete the row.",
    ),
    (
        "history flat",
        '{"instruction": "Q", "output": "A", "history": ["q", "a"]}',
        ", field 'history[0]': is a text ('q'), not a pair. Write it as [instruction, output].",
    ),
]


@pytest.mark.parametrize(("bad", "expected"), [pytest.param(*case, id=name) for name, *case in HISTORIES])
def test_a_history_that_is_no_list_of_pairs(tmp_path: Path, bad: str, expected: str) -> None:
    message = complaint_about(tmp_path / "a.json", f"[{GOOD}, {bad}, {GOOD}]")
    assert message.startswith("1 of 3 rows can't be used:\n")
    assert f"\n  - a.json, row 2{expected}\n" in message
    assert message.endswith("Fix them in the file, or leave them out: data.on_bad_row=skip")


# Name, a file of two rows the second of which is bad, the message.
BAD_ROWS = [
    (
        "share role",
        '[{"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, '
        '{"conversations": [{"from": "narrator", "value": "A"}]}]',
        "a.json, row 2, field 'conversations[0].from': is a text ('narrator'), not a known role. <ROLES>",
    ),
    (
        "share value",
        '[{"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, '
        '{"conversations": [{"from": "human", "text": "A"}]}]',
        "a.json, row 2, field 'conversations[0].value': is missing. Add it, or delete the row.",
    ),
    (
        "completion null",
        '[{"prompt": "Q", "completion": "A"}, {"prompt": "Q", "completion": null}]',
        "a.json, row 2, field 'completion': is null. Write a text, or delete the row.",
    ),
    (
        "completion text",
        '[{"prompt": "Q", "completion": "A"}, {"prompt": [<U>], "completion": "A"}]',
        "a.json, row 2, field 'completion': is a text ('A'), not a list. <LIST>",
    ),
    (
        "completion user",
        '[{"prompt": "Q", "completion": "A"}, {"prompt": [<U>], "completion": [<U>]}]',
        "a.json, row 2, field 'prompt[0]': is a user turn without an answer. Add the assistant's answer, or delete "
        "this turn.",
    ),
]


@pytest.mark.parametrize(("content", "expected"), [pytest.param(*case, id=name) for name, *case in BAD_ROWS])
def test_a_bad_row_of_each_format(tmp_path: Path, content: str, expected: str) -> None:
    assert f"\n  - {in_full(expected)}\n" in complaint_about(tmp_path / "a.json", in_full(content))


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


def test_answers_inside_a_prompt_are_read_and_not_learnt(tmp_path: Path) -> None:
    earlier = {"role": "assistant", "content": "EARLIER"}
    (row,) = read(tmp_path, {"prompt": [USER, earlier, USER], "completion": [ANSWER]}).rows
    assert [exchange.learnt for exchange in row.exchanges] == [False, True]
    assert learnt_of_row(row, "alpaca") == f"A{TINY.eos_token}"
