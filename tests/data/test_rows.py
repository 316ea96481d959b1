"""Files become rows or a message, whatever is in them, and texts are kept byte for byte."""

import codecs
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from huarizo.data import rows as rows_module
from huarizo.data.rows import Problem, read_rows, require_good, write_skipped
from huarizo.data.turns import Exchange
from huarizo.errors import DataError
from tests.data.reading import (
    ANSWER,
    GOOD,
    SUFFIXES,
    USER,
    assert_rows_or_a_message,
    complaint,
    complaint_about,
    conversations,
    in_full,
    write,
)

# Name, file, content, how the message begins.
FILES = [
    (
        "other names",
        "a.json",
        '[{"question": "Q", "answer": "A"}]',
        "a.json: fits no format. Its fields are: 'question', 'answer'. <NEEDED> Rename the fields, or say "
        "which is which, like: <MAPPING>",
    ),
    (
        "dolly",
        "a.json",
        '[{"instruction": "Q", "context": "", "response": "A"}]',
        "a.json: fits no format. Its fields are: 'instruction', 'context', 'response'. <NEEDED> Rename the "
        "fields, or say which is which, like: data.columns.output=response data.columns.input=context.",
    ),
    (
        "strange names",
        "a.json",
        '[{"x": "Q", "y": "A"}]',
        "a.json: fits no format. Its fields are: 'x', 'y'. <NEEDED> Rename the fields, or say which is which, "
        "like: <MAPPING>",
    ),
    (
        "no fields",
        "a.json",
        "[{}]",
        "a.json: fits no format. Its fields are: none. <NEEDED> Rename the fields, or say which is which, "
        "like: <MAPPING>",
    ),
    ("header only", "a.csv", "instruction,output\n", "a.csv: has no rows. Write rows into it, or leave it out."),
    (
        "no header",
        "a.csv",
        "Q,A\nQ,A\n",
        "a.csv: fits no format. Its fields are: 'Q', 'A'. <NEEDED> Name them in the first line, or say which "
        "is which, like: <MAPPING>",
    ),
]


@pytest.mark.parametrize(("file", "content", "expected"), [pytest.param(*case, id=name) for name, *case in FILES])
def test_a_file_of_no_known_format(tmp_path: Path, file: str, content: str | bytes, expected: str) -> None:
    assert complaint_about(tmp_path / file, content).startswith(in_full(expected))


ROW = '{"instruction": "...", "output": "..."}'


COMPLAINTS_ABOUT_COLUMNS = [
    (
        {"instructions": "question"},
        "data.columns.instructions: Huarizo has no field of this name. Did you mean 'instruction'? The fields are: "
        "conversations, system, tools, label, messages, instruction, output, input, history, prompt, completion, text.",
    ),
    (
        {"instruction": "questions", "output": "answer"},
        "a.json: has no column 'questions' (data.columns.instruction). Did you mean 'question'? "
        "The columns are: 'question', 'answer', 'id'.",
    ),
    (
        {"instruction": "question", "output": "answer", "input": "context"},
        "a.json: has no column 'context' (data.columns.input). The columns are: 'question', 'answer', 'id'.",
    ),
    (
        {"instruction": "question", "messages": "answer"},
        "a.json: fits no format. Its fields are: 'question', 'answer', 'id'.",
    ),
]


@pytest.mark.parametrize(("columns", "expected"), COMPLAINTS_ABOUT_COLUMNS)
def test_columns_that_are_not_there(tmp_path: Path, columns: dict[str, str], expected: str) -> None:
    (tmp_path / "a.json").write_text('[{"question": "Q", "answer": "A", "id": 1}]')
    assert complaint(tmp_path / "a.json", columns).startswith(expected)


def test_no_row_is_an_object(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(["a"] * 25))
    lines = complaint(tmp_path / "a.json").splitlines()
    assert lines[0] == "a.json: has no row that can be read."
    assert lines[1] == f"  - a.json, row 1: is a text ('a'), not an object. Write an object: {ROW}."
    assert lines[20:] == [
        f"  - a.json, row 20: is a text ('a'), not an object. Write an object: {ROW}.",
        "  ... and 5 more",
    ]


# Name, the second of three rows, the message after "a.json, row 2".
BAD_ROWS = [
    (
        "string row",
        '"Q"',
        ': is a text (\'Q\'), not an object. Write an object: {"instruction": "...", "output": "..."}.',
    ),
    (
        "list row",
        '["Q", "A"]',
        ': is a list of 2, not an object. Write an object: {"instruction": "...", "output": "..."}.',
    ),
    ("null row", "null", ': is null, not an object. Write an object: {"instruction": "...", "output": "..."}.'),
    ("number row", "5", ': is a number (5), not an object. Write an object: {"instruction": "...", "output": "..."}.'),
]


@pytest.mark.parametrize(("bad", "expected"), [pytest.param(*case, id=name) for name, *case in BAD_ROWS])
def test_a_row_that_is_no_object(tmp_path: Path, bad: str, expected: str) -> None:
    message = complaint_about(tmp_path / "a.json", f"[{GOOD}, {bad}, {GOOD}]")
    assert message.startswith("1 of 3 rows can't be used:\n")
    assert f"\n  - a.json, row 2{expected}\n" in message
    assert message.endswith("Fix them in the file, or leave them out: data.on_bad_row=skip")


def test_column_mapping(tmp_path: Path) -> None:
    record = {"question": "Q", "answer": "A", "input": "not this", "instruction": "nor this"}
    columns = {"instruction": "question", "output": "answer", "input": "instruction"}
    for suffix in SUFFIXES:
        rows = read_rows(write(tmp_path / f"a{suffix}", [record]), columns)
        assert (rows.format, conversations(rows)) == ("alpaca", [("", (Exchange("Q", "nor this", "A"),))])
    swapped = read_rows(write(tmp_path / "b.json", [{"input": "Q", "output": "A"}]), {"instruction": "input"})
    assert conversations(swapped) == [("", (Exchange("Q", "", "A"),))], "a mapped column is not its own field as well"
    turns = read_rows(write(tmp_path / "c.json", [{"chat": [USER, ANSWER]}]), {"messages": "chat"})
    assert turns.format == "messages"
    (tmp_path / "d.json").write_text('[{"question": "Q", "answer": "A"}, {"question": "Q", "answer": 1}]')
    bad = read_rows(tmp_path / "d.json", {"instruction": "question", "output": "answer"})
    assert [problem.field for problem in bad.problems] == ["answer"], "problems name the column as the file does"


def test_skip_and_what_is_written_of_it(tmp_path: Path) -> None:
    path = tmp_path / "알파카.jsonl"
    path.write_text(
        '{"instruction": "Q", "output": "A"}\nnonsense\n{"instruction": 1, "output": null}\n', encoding="utf-8"
    )
    rows = read_rows(path)
    assert [row.number for row in require_good(rows, "skip")] == [1]
    assert (rows.problem_count, rows.bad_row_count) == (3, 2)
    (tmp_path / "run").mkdir()
    write_skipped(rows.problems, tmp_path / "run" / "skipped.jsonl")
    written = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text("utf-8").splitlines()]
    assert [(line["row"], line["field"], line["what"]) for line in written] == [
        (2, "", "is not JSON: expecting value, column 1, near 'nonsense\\n'"),
        (3, "instruction", "is a number (1)"),
        (3, "output", "is null"),
    ]
    assert list(written[2].items())[-1] == ("remedy", "Write a text, or delete the row")
    assert written[0]["file"] == str(path)


def test_nothing_left_to_train_on(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "a.json", [{"instruction": "Q", "output": ""}]))
    with pytest.raises(
        DataError, match=r"1 of 1 rows can't be used:\n.*\nNo good row is left\. Fix them in the file\."
    ):
        require_good(rows, "skip")


def test_problems_are_capped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "MAX_PROBLEMS", 1000)
    rows = read_rows(write(tmp_path / "a.json", [{"instruction": "Q", "output": 1}] * 1500))
    assert (len(rows.problems), rows.problem_count, rows.bad_row_count) == (1000, 1500, 1500)
    with pytest.raises(DataError) as caught:
        require_good(rows, "fail")
    assert str(caught.value).count("\n  - ") == 20
    assert "\n  ... and 1480 more\n" in str(caught.value)


def test_a_problem_names_file_row_field_and_remedy() -> None:
    problem = Problem("alpaca.json", 17, "output", "is a number (3)", 'Write it as a string: "3"')
    assert str(problem) == "alpaca.json, row 17, field 'output': is a number (3). Write it as a string: \"3\"."


def test_import_is_light() -> None:
    heavy = ("torch", "transformers", "pandas", "pyarrow", "datasets")
    code = f"import sys, huarizo.data.rows; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_real_rows_are_kept_in_every_form(tmp_path: Path, real_rows_file: Path) -> None:
    records = json.loads(real_rows_file.read_text("utf-8"))
    expected = [("", (Exchange(each["instruction"], each["input"], each["output"]),)) for each in records]
    assert conversations(read_rows(real_rows_file)) == expected
    for suffix in (".json", ".jsonl", ".csv", ".parquet"):
        target = write(tmp_path / f"a{suffix}", records)
        assert conversations(read_rows(target)) == expected


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)


REQUIRED = TEXTS.filter(lambda text: not text.isspace())


ALPACA = st.fixed_dictionaries({"instruction": REQUIRED, "input": st.just("") | TEXTS, "output": REQUIRED})


@settings(max_examples=60, deadline=None)
@given(st.lists(ALPACA, min_size=1, max_size=5), st.sampled_from(SUFFIXES))
@example([{"instruction": "\ufeff\r", "input": "\n\r\n", "output": '"\u2028,\t\x1a\x85'}], ".csv")
@example([{"instruction": "\ufeff\r", "input": "\n\r\n", "output": '"\u2028,\t\x1a\x85'}], ".jsonl")
def test_any_text_is_kept(records: list[dict[str, str]], suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = read_rows(write(Path(folder, f"a{suffix}"), records))
    expected = [("", (Exchange(each["instruction"], each["input"], each["output"]),)) for each in records]
    assert conversations(rows) == expected


NAMES = st.sampled_from(["instruction", "output", "input", "history", "system", "messages", "conversations", "prompt"])
NAMES |= st.sampled_from(["completion", "role", "content", "from", "value", "data"]) | st.text(max_size=3)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
SCALARS |= st.sampled_from(["user", "assistant", "system", "human", "gpt", "\ud800", "\0", "[[1]]"])


VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4))


ROWS = st.lists(st.dictionaries(NAMES, VALUES, max_size=4), max_size=4)


@settings(max_examples=150, deadline=None)
@given(ROWS | VALUES, st.sampled_from([".json", ".jsonl"]))
@example([{"prompt": [], "completion": []}], ".json")
@example({"\ud800": [{"\ud800": 1}]}, ".json")
def test_any_json_is_rows_or_a_message(value: object, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"a{suffix}")
        values = value if suffix == ".jsonl" and isinstance(value, list) else [value]
        path.write_text(json.dumps(value) if suffix == ".json" else "\n".join(json.dumps(each) for each in values))
        assert_rows_or_a_message(path)


TEXT_SUFFIXES = [suffix for suffix in SUFFIXES if suffix not in (".parquet", ".arrow")]  # read in this process
BEGINNINGS = st.sampled_from(
    [b"", b"[", b'{"messages": [', b'[{"instruction": "', b"instruction,output\n", b"PAR1", b'"']
)
BEGINNINGS |= st.sampled_from([codecs.BOM_UTF8, codecs.BOM_UTF16_LE, b'{"instruction": "Q", "output": "A"}\n{"\\u'])


@settings(max_examples=150, deadline=None)
@given(BEGINNINGS, st.binary(max_size=200), st.sampled_from([*TEXT_SUFFIXES, ".txt", ".gz"]))
def test_any_bytes_are_rows_or_a_message(beginning: bytes, data: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"a{suffix}")
        path.write_bytes(beginning + data)
        assert_rows_or_a_message(path)
