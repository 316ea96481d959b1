"""Several data sets in a recipe are found, pinned and read like one."""

import json
from pathlib import Path

import pytest

from huarizo.errors import UserError
from huarizo.prepare import prepare
from huarizo.recipe import Recipe, make_recipe, with_overrides


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_folder: Path, alpaca_file: Path) -> Recipe:
    """A list of an Alpaca file, and of the ShareGPT rows in a folder that holds a test split too."""
    folder = tmp_path / "chats"
    folder.mkdir()
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hi."}]
    (folder / "train.jsonl").write_text(json.dumps({"conversations": turns, "id": 1}))
    (folder / "test.jsonl").write_text(json.dumps({"conversations": [turns[0], {"from": "gpt", "value": "Yes?"}]}))
    recipe = make_recipe(model=str(tiny_model_folder), precision="fp32", data={"eval": f"{folder}[test]"})
    return with_overrides(recipe, [f"data.train=[{alpaca_file}, {folder}]"])


def test_a_list_of_data_sets(recipe: Recipe, alpaca_file: Path, tmp_path: Path) -> None:
    prepared = prepare(recipe)
    folder = tmp_path / "chats"
    assert (len(prepared.data.rows), len(prepared.data.heldout_rows)) == (13, 1)
    assert prepared.data.format == "alpaca, sharegpt"
    assert prepared.data.notes == [
        f"{folder}: split train, not read: split test",
        f"{folder}: split test, not read: split train",
        "not used: id",
    ]
    resolved = prepared.recipe
    assert resolved.data.train == [str(alpaca_file), f"{folder}[train]"]
    assert resolved.data.eval == f"{folder}[test]"
    assert resolved.pinned["train"].keys() == {"0/rows.json", "1/train.jsonl"}
    assert resolved.pinned["eval"].keys() == {"test.jsonl"}
    assert prepare(resolved).recipe == resolved, "a resolved recipe is found again as it is"


@pytest.mark.parametrize("name", ["rows.json", "chats/train.jsonl", "chats/test.jsonl"])
def test_one_changed_file_of_a_list_is_noticed(recipe: Recipe, tmp_path: Path, name: str) -> None:
    resolved = prepare(recipe).recipe
    with (tmp_path / name).open("a") as file:
        file.write("\n")
    with pytest.raises(UserError, match=f"{Path(name).name} is not the file that this recipe was made with"):
        prepare(resolved)
