"""An evaluation: its numbers, its files, and what it says where something is missing."""

import builtins
import dataclasses
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from huarizo.data.rows import Exchange, Row
from huarizo.errors import DataError, UserError
from huarizo.results import evaluate as evaluating
from huarizo.results.evaluate import chrf, evaluate, general_examples, heldout_rows, rows_of, save, show
from huarizo.results.generate import open_assistant
from huarizo.results.harness import run_harness
from tests.results.make import make_tuned

ROWS = [Row("rows.json", n, "", (Exchange(f"Count to {n}", "", "one two three " * n),)) for n in range(1, 9)]


def test_an_evaluation_is_shown_and_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluating, "LONGEST_ANSWER", 8)
    tuned = make_tuned(tmp_path)
    too_long = Row("rows.json", 99, "", (Exchange("x" * 2000, "", "never reached"),))
    found = evaluate(open_assistant(tuned, "fp32"), [*ROWS, too_long], to_answer=3)
    assert len(found.rows) == 8 and found.left_out == 1 and len(found.answers) == 3
    assert found.scores["after"].chrf is not None and len(found.general.tokens) >= 30
    assert found.losses.before != found.losses.after
    target = tmp_path / "evaluations" / "one"
    save(found, target, result="run", data="held out")
    summary = json.loads((target / "summary.json").read_text())
    rows = [json.loads(line) for line in (target / "rows.jsonl").read_text().splitlines()]
    assert summary["rows"] == 8 and summary["data"] == "held out"
    tokens = sum(row["tokens"] for row in rows)
    assert tokens == summary["tokens"]
    mean = sum(row["loss_after"] * row["tokens"] for row in rows) / tokens
    assert summary["loss"]["after"]["value"] == pytest.approx(mean)
    assert summary["loss"]["after"]["low"] < mean < summary["loss"]["after"]["high"]
    assert len((target / "answers.jsonl").read_text().splitlines()) == 3
    worst = max(rows, key=lambda row: row["loss_after"])
    console = Console(record=True, width=120)
    show(console, found)
    listed = console.export_text().partition("highest losses after training:\n")[2].splitlines()
    assert len(listed) == 5 and f"row {worst['row']}:" in listed[0]
    assert not list(tmp_path.rglob(".*"))


def test_a_row_whose_prompt_leaves_no_room_is_measured_but_not_answered(tmp_path: Path) -> None:
    assistant = open_assistant(make_tuned(tmp_path, max_position_embeddings=64), "fp32")
    long = Row("rows.json", 99, "", (Exchange("Count to " * 60, "", "three"),))
    found = evaluate(assistant, [long, ROWS[0]], to_answer=2)
    assert len(found.rows) == 2 and [answer["instruction"] for answer in found.answers] == ["Count to 1"]


def test_chrf_is_sacrebleus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chrf(["the same"], ["the same"]) == pytest.approx(100)
    middle = chrf(["the cat sat on a mat"], ["the cat sat on the mat"])
    assert middle is not None and 50 < middle < 95
    real = builtins.__import__
    monkeypatch.setattr(
        builtins, "__import__", lambda name, *a, **k: (_ for _ in ()).throw(ImportError()) if "sacrebleu" in name else real(name, *a, **k)
    )  # fmt: skip
    assert chrf(["a"], ["a"]) is None


def test_the_general_text_is_read_as_plain_text(tmp_path: Path) -> None:
    tuned = make_tuned(tmp_path)
    examples = general_examples(tuned.encoder)
    assert all(example["labels"] == example["input_ids"] for example in examples)
    entries = json.loads(evaluating.GENERAL.read_text(encoding="utf-8"))
    assert {"encyclopedia", "code", "korean", "dialogue"} <= {entry["kind"] for entry in entries}
    assert len({entry["text"] for entry in entries}) == len(entries) == len(examples)


def test_rows_without_a_response_in_reach_are_refused(tmp_path: Path) -> None:
    tuned = make_tuned(tmp_path)
    with pytest.raises(DataError, match="max_length"):
        evaluate(open_assistant(tuned, "fp32"), [Row("rows.json", 1, "", (Exchange("x" * 2000, "", "y"),))])
    with pytest.raises(UserError, match="huarizo eval ADAPTER DATA"):
        heldout_rows(tuned)


@pytest.mark.parametrize("precision", ["int8", "nonsense"])
def test_only_float_formats_are_measured_in(tmp_path: Path, precision: str) -> None:
    with pytest.raises(UserError, match="bf16, fp16 or fp32"):
        open_assistant(make_tuned(tmp_path), precision)


def test_rows_of_another_file_are_read_by_the_recipe(tmp_path: Path, alpaca_file: Path) -> None:
    tuned = make_tuned(tmp_path)
    assert len(rows_of(tuned, str(alpaca_file))) == 12
    renamed = tmp_path / "renamed.json"
    renamed.write_text(json.dumps([{"question": "1 + 1?", "answer": "2"}]))
    data = tuned.recipe.data.model_copy(update={"columns": {"instruction": "question", "output": "answer"}})
    other = dataclasses.replace(tuned, recipe=tuned.recipe.model_copy(update={"data": data}))
    (row,) = rows_of(other, str(renamed))
    assert row.exchanges[0].output == "2"


def test_the_harness_is_given_the_base_and_the_tuned_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assistant = open_assistant(make_tuned(tmp_path), "fp32")
    with pytest.raises(UserError, match="pip install lm-eval"):
        run_harness(assistant, ["hellaswag"])
    seen: list[Any] = []

    def simple_evaluate(model: Any, tasks: list[str], limit: int | None, **_: Any) -> dict[str, Any]:
        if tasks == ["unknown"]:
            raise KeyError("unknown task")
        active = model["pretrained"].base_model.model.model.layers[0].self_attn.q_proj.disable_adapters
        seen.append((active, model["pretrained"].get_base_model().config._attn_implementation, limit))
        return {"results": {"hellaswag": {"acc,none": 0.25 * len(seen), "alias": "hellaswag"}}}

    package, evaluator = types.ModuleType("lm_eval"), types.ModuleType("lm_eval.evaluator")
    wrapper = types.ModuleType("lm_eval.models.huggingface")
    evaluator.simple_evaluate, wrapper.HFLM = simple_evaluate, dict  # pyright: ignore
    modules = {"lm_eval": package, "lm_eval.evaluator": evaluator, "lm_eval.models": types.ModuleType("lm_eval.models")}
    for name, module in (modules | {"lm_eval.models.huggingface": wrapper}).items():
        monkeypatch.setitem(sys.modules, name, module)
    assert run_harness(assistant, ["hellaswag"], 5) == {"hellaswag": {"acc": {"before": 0.25, "after": 0.5}}}
    assert seen == [(True, "sdpa", 5), (False, "sdpa", 5)]
    with pytest.raises(UserError, match="lm-eval stopped at unknown"):
        run_harness(assistant, ["unknown"])
