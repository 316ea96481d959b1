"""Files become the data of a run: refused rows, rows that are cut away, and notes."""

import json
from pathlib import Path

import pytest

from huarizo.data.dataset import prepare_data
from huarizo.errors import DataError
from huarizo.model.load import load_tokenizer
from huarizo.recipe import DataRecipe, make_recipe
from tests.data.reading import write
from tests.tiny import CHATML, make_tokenizer


def test_rows_that_a_template_refuses_are_skipped_or_reported_all_at_once(tmp_path: Path) -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    rows = [{"instruction": f"Q{n}", "output": "A", "system": "S" if n in (2, 5) else ""} for n in range(8)]
    file = tmp_path / "a.json"
    file.write_text(json.dumps(rows))
    for policy in ("skip", "fail"):
        recipe = make_recipe(data={"train": "a.json", "eval": 0, "on_bad_row": policy}).data
        arguments = (recipe, 0, file, None, make_tokenizer(template), tmp_path)
        if policy == "fail":
            with pytest.raises(DataError, match=r"(?s)2 of 8 rows .*row 3: .*no system.*row 6: .*no system"):
                prepare_data(*arguments)
            continue
        data = prepare_data(*arguments)
        assert data.bad_row_count == 2 and [problem.number for problem in data.problems] == [3, 6]
        assert data.train.dataset["row"] == [0, 1, 3, 4, 6, 7]


def test_rows_of_which_nothing_is_left_are_refused(tmp_path: Path) -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    rows = [{"instruction": "Q", "output": "A", "system": "S"}, {"instruction": "long " * 100, "output": "A"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    recipe = make_recipe(data={"train": "a.json", "eval": 0, "on_bad_row": "skip", "max_length": 32}).data
    with pytest.raises(DataError, match="none of the 1 rows has any of its response within"):
        prepare_data(recipe, 0, tmp_path / "a.json", None, make_tokenizer(template), tmp_path)


def test_an_end_token_in_an_answer_is_noted(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{"instruction": "Q", "output": text} for text in ("A", "A <|im_end|>", "A")]))
    data = prepare_data(make_recipe(data={"eval": 0}).data, 0, file, None, make_tokenizer(), tmp_path)
    (note,) = data.notes
    assert "<|im_end|> is written out" in note and "row 2)" in note


def test_heldout_rows_that_are_trained_on_are_noted(tmp_path: Path, tiny_model_folder: Path) -> None:
    rows = [{"instruction": f"Q{number}", "output": "A"} for number in range(4)]
    train = write(tmp_path / "train.jsonl", rows)
    heldout = write(tmp_path / "heldout.jsonl", [rows[2], {"instruction": "new", "output": "A"}, rows[0]])
    tokenizer = load_tokenizer(tiny_model_folder)
    data = prepare_data(DataRecipe(), 42, train, heldout, tokenizer, tmp_path / "cache")
    assert data.notes == [
        f"2 of 3 held-out rows are also trained on, which makes the held-out loss too low: {heldout}, rows 1, 3"
    ]
    apart = write(tmp_path / "apart.jsonl", [{"instruction": "Q0", "output": "B"}])
    assert prepare_data(DataRecipe(), 42, train, apart, tokenizer, tmp_path / "cache").notes == []
