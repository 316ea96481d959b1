"""Rows are shown as the model sees them, with what it learns marked."""

import io
import json
from pathlib import Path

from rich.console import Console

from huarizo.data.dataset import prepare_data
from huarizo.data.show import show_examples
from huarizo.recipe import make_recipe
from tests.tiny import make_tokenizer


def test_the_first_rows_are_shown_with_notes_and_marks(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{"instruction": f"Q{n}", "output": f"A{n}", "source": "web"} for n in range(3)]))
    recipe = make_recipe(data={"eval": 0, "prompt": "alpaca"}).data
    data = prepare_data(recipe, 0, file, None, make_tokenizer(), tmp_path / "cache")
    for count, shown in ((2, 2), (9, 3)):
        text = io.StringIO()
        show_examples(Console(file=text, width=200), data, count)
        assert text.getvalue().startswith("note: not used: source")
        assert text.getvalue().count("--- ") == shown
        assert f"--- {file}, row 1: " in text.getvalue()
        assert "### Response:\n«A0<|im_end|>»" in text.getvalue()
