"""What is found, decided and refused before a model loads. Several data sets are pinned and read like one."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AddedToken, MixtralConfig, MixtralForCausalLM, RwkvConfig, RwkvForCausalLM

from huarizo.errors import HuarizoError, ModelError, RecipeError, UserError
from huarizo.recipe import Recipe, make_recipe, with_overrides
from huarizo.training.compatibility import same_training
from huarizo.training.finetune import fine_tune
from huarizo.training.prepare import prepare
from tests.general import GENERAL, SIZES
from tests.tiny import CHATML, make_model, make_tokenizer


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


def test_a_run_of_yesterday_is_the_same_training(recipe: Recipe) -> None:
    today = prepare(recipe).recipe
    yesterday = today.model_copy(deep=True)
    yesterday.data.date = "2020-01-01"
    assert same_training(yesterday, today)
    yesterday.data.max_length = 100
    assert not same_training(yesterday, today)


@pytest.mark.parametrize("name", ["rows.json", "chats/train.jsonl", "chats/test.jsonl"])
def test_one_changed_file_of_a_list_is_noticed(recipe: Recipe, tmp_path: Path, name: str) -> None:
    resolved = prepare(recipe).recipe
    with (tmp_path / name).open("a") as file:
        file.write("\n")
    with pytest.raises(UserError, match=f"{Path(name).name} is not the file that this recipe was made with"):
        prepare(resolved)


def model_folder(tmp_path: Path, tokenizer: Any) -> str:
    folder = tmp_path / "model"
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_tokenizer_longer_than_the_embedding_is_refused_where_the_data_uses_it(
    tmp_path: Path, alpaca_file: Path
) -> None:
    tokenizer = make_tokenizer(chat_template=None)
    tokenizer.add_tokens([AddedToken("[NEVER]"), AddedToken("Count")])
    values = {"model": model_folder(tmp_path, tokenizer), "precision": "fp32"}
    with pytest.raises(ModelError, match=r"has 262 tokens, .* only 260, .*'Count'"):
        prepare(make_recipe(**values, data={"train": str(alpaca_file)}))
    other = tmp_path / "other.json"
    other.write_text('[{"instruction": "Q", "output": "A"}]')
    data = prepare(make_recipe(**values, data={"train": str(other), "eval": 0})).data
    assert data.train.largest < 260
    assert data.notes == [
        "the tokenizer has 262 tokens, and the model's embedding 260. No row uses the others; a prompt that "
        "does is refused"
    ]


def test_rows_are_cut_at_the_positions_of_the_model(recipe: Recipe) -> None:
    prepared = prepare(with_overrides(recipe, ["data.max_length=4096"]))
    assert prepared.recipe.data.max_length == prepared.data.encoder.max_length == 2048
    assert "rows are cut at the 2,048 tokens that the model supports, not at data.max_length=4096" in (
        prepared.data.notes
    )
    assert prepare(prepared.recipe).recipe == prepared.recipe


def test_the_first_day_is_the_day_of_the_whole_run(
    tmp_path: Path, alpaca_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Later(datetime.date):
        @classmethod
        def today(cls) -> datetime.date:
            return datetime.date(2031, 1, 1)

    template = "{{ strftime_now('%d %b %Y') + '\\n' }}" + CHATML
    model = model_folder(tmp_path, make_tokenizer(template))
    first = prepare(make_recipe(model=model, data={"train": str(alpaca_file)}, precision="fp32"))
    assert first.recipe.data.date is not None
    monkeypatch.setattr("huarizo.data.prompts.datetime.date", Later)
    again = prepare(first.recipe)
    assert again.recipe.data.date == first.recipe.data.date
    assert again.data.train.fingerprint == first.data.train.fingerprint
    new = prepare(make_recipe(model=model, data={"train": str(alpaca_file)}, precision="fp32"))
    assert new.recipe.data.date == "2031-01-01"
    plain = prepare(make_recipe(model=model, data={"train": str(alpaca_file), "prompt": "alpaca"}, precision="fp32"))
    assert plain.recipe.data.date is None


def test_data_that_changes_while_it_is_read_is_refused(recipe: Recipe, alpaca_file: Path, monkeypatch: Any) -> None:
    import huarizo.training.prepare

    read = huarizo.training.prepare.prepare_data

    def changing(*arguments: Any) -> Any:
        data = read(*arguments)
        alpaca_file.write_text("[]")
        return data

    monkeypatch.setattr(huarizo.training.prepare, "prepare_data", changing)
    with pytest.raises(HuarizoError, match="changed while it was being read"):
        fine_tune(recipe)


def test_int8_does_not_need_a_model_that_packs_but_one_without_experts(
    recipe: Recipe, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    recipe.model = str(GENERAL["opt"].save(tmp_path / "opt", tiny_tokenizer))
    recipe.precision = "int8"
    plan = prepare(recipe).plan
    assert plan.choice.precision == "int8" and plan.batching == "padded"
    mixtral = MixtralConfig(**SIZES, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2)
    models = {
        "mixtures of experts are trained in float, .*, not int8": MixtralForCausalLM(mixtral),
        "rwkv is trained in float, because it rescales": RwkvForCausalLM(RwkvConfig(**SIZES)),
    }
    for reason, model in models.items():
        folder = tmp_path / model.config.model_type
        model.save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        recipe.model, recipe.precision = str(folder), "int8"
        with pytest.raises(RecipeError, match=f"precision: {reason}"):
            prepare(recipe)
        recipe.precision = "auto"
        assert prepare(recipe).plan.choice.precision != "int8"
