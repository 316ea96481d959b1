"""An evaluation: its numbers, its files, and what it says where something is missing."""

import builtins
import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from huarizo.console import PlainConsole
from huarizo.data.prompts import OpenExchange
from huarizo.data.rows import Exchange, Row
from huarizo.errors import DataError, ModelError, UserError
from huarizo.inference.artifact import read_otherwise
from huarizo.inference.generate import Assistant, Sampling, open_assistant, stream_answer
from huarizo.results import evaluate as evaluating
from huarizo.results.evaluate import chrf, evaluate, general_examples, heldout_rows, rows_of, save, show
from huarizo.results.statistics import Losses
from tests.results.make import make_tuned
from tests.tiny import make_tokenizer

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
    tuned = read_otherwise(make_tuned(tmp_path, max_position_embeddings=64), ["data.max_length=64"])
    tuned.encoder.labels = "all"
    assistant = open_assistant(tuned, "fp32")
    long = Row("rows.json", 99, "", (Exchange("Count to " * 60, "", "three"),))
    found = evaluate(assistant, [long, ROWS[0]], to_answer=2)
    assert len(found.rows) == 2 and [answer["instruction"] for answer in found.answers] == ["Count to 1"]


def test_rows_are_cut_at_the_positions_of_the_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assistant = open_assistant(make_tuned(tmp_path, max_position_embeddings=64), "fp32")
    row = Row("rows.json", 1, "", (Exchange("Hi", "", "x" * 200),))
    found = evaluate(assistant, [row], to_answer=0)
    assert sum(found.losses.tokens) < 64
    assert "cut at the 64 tokens that the model supports, not at data.max_length=512" in caplog.text


def test_tokens_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["[NEW]"])
    assistant = open_assistant(make_tuned(tmp_path, tokenizer, vocab_size=260), "fp32")
    with pytest.raises(ModelError, match=r"has 261 tokens, .* only 260, .*'\[NEW\]'"):
        evaluate(assistant, [Row("rows.json", 1, "", (Exchange("[NEW]", "", "x"),))])
    with pytest.raises(ModelError, match="only 260"):
        assistant.prompt_ids("", [OpenExchange("[NEW]")])


def test_a_row_is_answered_under_its_system_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluating, "LONGEST_ANSWER", 8)
    assistant = open_assistant(make_tuned(tmp_path), "fp32")
    rows = [dataclasses.replace(ROWS[0], system=system) for system in ("", "Be rude.")]
    plain, spoken = evaluate(assistant, rows).answers
    turns = [OpenExchange("Count to 1")]
    alone = stream_answer(assistant, turns, lambda _: None, "Be rude.", Sampling(8))
    assert spoken["after"] == alone.text != plain["after"] and spoken["before"] != plain["before"]
    assert spoken["system"] == "Be rude." and spoken["expected"] == ROWS[0].exchanges[0].output


NOTHING = Losses([20.0, 30.0], [10.0, 20.0], [10, 10])


def found_losses(before: list[float], after: list[float]) -> evaluating.Evaluation:
    return evaluating.Evaluation(ROWS[: len(after)], 0, Losses(before, after, [10] * len(after)), NOTHING, [], {})


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_null_and_the_worst(tmp_path: Path, odd: float) -> None:
    found = found_losses([20.0, odd, 30.0], [10.0, odd, 20.0])
    assert found.worst()[0] == 1
    save(found, tmp_path / "new")

    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} is no JSON")

    rows = [
        json.loads(line, parse_constant=refuse) for line in (tmp_path / "new" / "rows.jsonl").read_text().splitlines()
    ]
    assert [row["loss_after"] for row in rows] == [1.0, None, 2.0] and rows[1]["loss_before"] is None
    summary = json.loads((tmp_path / "new" / "summary.json").read_text(), parse_constant=refuse)
    assert summary["loss"]["after"] == summary["loss"]["change"] == {"value": None, "low": None, "high": None}
    assert summary["general_loss"]["after"]["value"] == 1.5
    show(console := PlainConsole(record=True, width=200), found)
    assert "row 2:" in console.export_text().partition("highest losses after training:\n")[2].splitlines()[0]


def test_one_row_is_shown_without_an_interval(tmp_path: Path) -> None:
    found = found_losses([20.0], [10.0])
    show(console := PlainConsole(record=True, width=200), found)
    shown = console.export_text()
    assert "nan" not in shown and "1.0000" in shown and "rough" in shown
    save(found, tmp_path / "new")
    loss = json.loads((tmp_path / "new" / "summary.json").read_text())["loss"]
    assert loss["after"] == {"value": 1.0, "low": None, "high": None}
    assert loss["perplexity"]["after"] == {"value": pytest.approx(math.e), "low": None, "high": None}


def test_no_row_commands_the_terminal() -> None:
    row = Row("a\x9b.json", 1, "", (Exchange("\x1b[2J\x07Say", "", "y"),))
    found = dataclasses.replace(found_losses([20.0], [10.0]), rows=[row])
    show(console := PlainConsole(record=True, width=200), found)
    assert not any(bad in console.export_text() for bad in "\x1b\x9b\x07")


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
    assistant = open_assistant(make_tuned(tmp_path), "fp32")
    examples = general_examples(assistant)
    assert all(example.labels == example.input_ids for example in examples)
    entries = json.loads(evaluating.GENERAL.read_text(encoding="utf-8"))
    assert {"encyclopedia", "code", "korean", "dialogue"} <= {entry["kind"] for entry in entries}
    assert len({entry["text"] for entry in entries}) == len(entries) == len(examples)


def test_the_general_text_is_the_same_for_every_length_of_rows(tmp_path: Path) -> None:
    tuned = make_tuned(tmp_path, max_position_embeddings=300)
    assistant = open_assistant(tuned, "fp32")
    examples = general_examples(assistant)
    assert max(len(example.input_ids) for example in examples) == 300
    shorter = read_otherwise(tuned, ["data.max_length=32"]).encoder
    assert shorter.max_length == 32 and general_examples(Assistant(assistant.model, shorter)) == examples


def test_rows_without_a_response_in_reach_are_refused(tmp_path: Path) -> None:
    tuned = make_tuned(tmp_path)
    with pytest.raises(DataError, match="max_length"):
        evaluate(open_assistant(tuned, "fp32"), [Row("rows.json", 1, "", (Exchange("x" * 2000, "", "y"),))])
    with pytest.raises(UserError, match="huarizo eval ADAPTER DATA"):
        heldout_rows(tuned)


def test_rows_of_another_file_are_read_by_the_recipe(tmp_path: Path, alpaca_file: Path) -> None:
    tuned = make_tuned(tmp_path)
    assert len(rows_of(tuned, str(alpaca_file))) == 12
    renamed = tmp_path / "renamed.json"
    renamed.write_text(json.dumps([{"question": "1 + 1?", "answer": "2"}]))
    data = tuned.recipe.data.model_copy(update={"columns": {"instruction": "question", "output": "answer"}})
    other = dataclasses.replace(tuned, recipe=tuned.recipe.model_copy(update={"data": data}))
    (row,) = rows_of(other, str(renamed))
    assert row.exchanges[0].output == "2"


def test_rows_are_read_otherwise_on_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "other.json"
    file.write_text(json.dumps([{"question": "1 + 1?", "answer": "2"}, {"question": "2 + 2?", "answer": 4}]))
    tuned = make_tuned(tmp_path)
    words = ["data.columns.instruction=question", "data.columns.output=answer"]
    with pytest.raises(DataError, match="row 2"):
        rows_of(read_otherwise(tuned, words), str(file))
    other = read_otherwise(
        tuned, ["data.columns={instruction: question, output: answer}", "data.max_length=64", "data.on_bad_row=skip"]
    )
    assert other.encoder.max_length == other.recipe.data.max_length == 64 and tuned.encoder.max_length == 512
    with caplog.at_level(logging.WARNING, "huarizo"):
        (row,) = rows_of(other, str(file))
    assert row.exchanges[0].output == "2" and "1 bad rows are skipped" in caplog.text
    assert other.encoder.encode_prompt("", [OpenExchange("Hi")]) == tuned.encoder.encode_prompt(
        "", [OpenExchange("Hi")]
    )
