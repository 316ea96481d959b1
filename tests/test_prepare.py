"""What is decided and refused before a model loads."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AddedToken

from huarizo.errors import ModelError
from huarizo.prepare import prepare
from huarizo.recipe import make_recipe
from tests.tiny import CHATML, make_model, make_tokenizer


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
    assert prepare(make_recipe(**values, data={"train": str(other), "eval": 0})).data.train.largest < 260


def test_the_first_day_is_the_day_of_the_whole_run(
    tmp_path: Path, alpaca_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datetime

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
