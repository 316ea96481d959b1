"""Notes on rows that can be used, and the column mapping that is proposed."""

from pathlib import Path
from typing import Any

import pytest

from huarizo.data.notes import MAX_PLACES
from huarizo.data.rows import read_rows
from huarizo.errors import DataError
from tests.data.reading import write

MAPPINGS = [
    (
        {"instruction": "Q", "context": "", "response": "A"},
        "data.columns.output=response data.columns.input=context",
    ),
    (
        {"id": 1, "system_prompt": "S", "question": "Q", "response": "A"},
        "data.columns.instruction=question data.columns.output=response data.columns.system=system_prompt",
    ),
    ({"Question": "Q", "Answer": "A"}, "data.columns.instruction=Question data.columns.output=Answer"),
    ({"dialog": [{"role": "user"}], "system_message": ""}, "data.columns.messages=dialog data.columns.system=system_"),
]


@pytest.mark.parametrize(("record", "mapping"), MAPPINGS)
def test_all_columns_with_usual_names_are_in_the_proposed_mapping(
    tmp_path: Path, record: dict[str, Any], mapping: str
) -> None:
    with pytest.raises(DataError) as caught:
        read_rows(write(tmp_path / "a.jsonl", [record]))
    assert f"say which is which, like: {mapping}" in str(caught.value)


def test_columns_that_are_not_used_are_named_once(tmp_path: Path) -> None:
    row = {"instruction": "Q", "output": "A"}
    write(tmp_path / "a.jsonl", [row | {"context": "C"}, row | {"source": "web"}])
    write(tmp_path / "b.jsonl", [row | {"context": "C", "input": "I", "system_prompt": "S"}])
    assert read_rows(tmp_path).notes == [
        "not used: context, source, system_prompt; to use them: "
        "data.columns.input=context data.columns.system=system_prompt"
    ]
    columns = {"input": "context"}
    assert read_rows(tmp_path / "a.jsonl", columns).notes == ["not used: source"]
    assert read_rows(write(tmp_path / "c.jsonl", [row])).notes == []


def test_texts_that_stand_for_no_text(tmp_path: Path) -> None:
    rows = [{"instruction": "Q", "input": text, "output": "A"} for text in ("<noinput>", " <NoInput>\n", "noinput")]
    rows += [{"instruction": "nan", "output": "A"}, {"instruction": "Q", "output": "None"}]
    rows += [{"instruction": "None of it", "output": "null and void"}]
    path = write(tmp_path / "a.jsonl", rows)
    read = read_rows(path)
    assert [row.exchanges[0].input for row in read.rows[:3]] == ["", "", "noinput"]
    assert [row.exchanges[0].output for row in read.rows[3:5]] == ["A", "None"], "learnt as it stands"
    assert read.notes == [
        f"<noinput> is read as no input in 2 rows ({path}, rows 1, 2)",
        f'"nan", "None" or "null" is a whole text, and is learnt as written, in 2 rows ({path}, rows 4, 5). '
        "Delete these rows if it means that the text is missing",
    ]
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "nan"}]
    many = write(tmp_path / "b.jsonl", [{"messages": turns}] * (MAX_PLACES + 3))
    assert "in 13 rows" in read_rows(many).notes[0] and "10 and 3 more)" in read_rows(many).notes[0]
