"""Evaluates a tuned model: its loss on rows that it did not see, its answers to them, and what it forgot.

The rows are the run's held-out ones or any others. The result is a report and a folder of files. The base model is
measured in the same way, so every number has a before and an after. A general text that ships with Huarizo shows
forgetting.
"""

import itertools
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from huarizo.data.dataset import prepare_data
from huarizo.data.records import Flaw
from huarizo.data.rows import Problem, Row, Rows, read_rows, require_good
from huarizo.data.tokens import Example
from huarizo.errors import DataError, UserError
from huarizo.files import make_parent, whole_folder
from huarizo.host import cache_folder
from huarizo.hub.names import check_pinned, files_of, resolve_data
from huarizo.inference.artifact import Tuned
from huarizo.inference.generate import Assistant, answers
from huarizo.inference.samples import Sample, samples_of
from huarizo.recipe import names_of
from huarizo.results.harness import HarnessScores
from huarizo.results.statistics import Losses, Mean, measure

logger = logging.getLogger(__name__)

GENERAL = Path(__file__).with_name("general_text.json")
LONGEST_ANSWER = 200  # tokens
FEW = 20  # rows; with fewer, the interval is rough
SUMMARY = "summary.json"  # every evaluation's folder has one


@dataclass(frozen=True)
class Scores:
    """How close the answers are to the expected ones. `chrf`: 0 to 100; None if sacrebleu is not installed."""

    chrf: float | None
    exact: float
    """Share of answers equal to the expected one, apart from white space."""
    finished: float
    """Share of answers that the model ended itself."""


@dataclass(frozen=True)
class Evaluation:
    """Everything that was measured. `losses` has a value for each of `rows`; `answers` belong to the first that fit."""

    rows: list[Row]
    left_out: int
    """Number of rows without any response within `data.max_length`."""
    losses: Losses
    general: Losses
    answers: list[dict[str, str]]
    scores: dict[str, Scores]

    def worst(self, count: int = 5) -> list[int]:
        """Indices of the rows with the highest mean loss after training, worst first."""
        means = [loss / tokens for loss, tokens in zip(self.losses.after, self.losses.tokens, strict=True)]
        sizes = [mean if math.isfinite(mean) else math.inf for mean in means]
        return sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)[:count]


def heldout_rows(tuned: Tuned) -> list[Row]:
    """The rows that the run held out.

    Raises:
        UserError: it held out none, or its data has changed.
    """
    if tuned.run is None:
        raise UserError("an adapter from elsewhere has no held-out rows. Pass some: huarizo eval ADAPTER DATA")
    recipe = tuned.recipe
    train = [resolve_data(name) for name in names_of(recipe.data.train)]
    check_pinned("train", train, recipe.pinned.get("train", {}))
    heldout = [resolve_data(name, heldout=True) for name in names_of(recipe.data.eval)]
    if heldout:
        check_pinned("eval", heldout, recipe.pinned.get("eval", {}))
    data = prepare_data(
        recipe.data, recipe.training.seed, files_of(train), files_of(heldout),
        tuned.encoder.tokenizer, cache_folder() / "tokens",
    )  # fmt: skip
    if not data.heldout_rows:
        raise UserError(f"{tuned.run.path}: this run held out no rows. Pass some: huarizo eval {tuned.run.path} DATA")
    return data.heldout_rows


def rows_of(tuned: Tuned, name: str) -> list[Row]:
    """Rows of a file, folder or data set on the hub, with the column names of the run's recipe.

    Raises:
        UserError: the rows are not found or can't be used.
    """
    data = tuned.recipe.data
    source = resolve_data(name, heldout=True)
    read = read_rows(source.files, data.columns)
    good = require_good(read, data.on_bad_row)
    if source.note:
        logger.warning("%s", source.note)
    if read.bad_row_count:
        logger.warning("%s: %d bad rows are skipped", name, read.bad_row_count)
    return good


def evaluate(
    assistant: Assistant,
    rows: Sequence[Row],
    to_answer: int = 32,
    console: Console | None = None,
    on_bad_row: Literal["fail", "skip"] = "fail",
) -> Evaluation:
    """Measure losses on all rows and on the general text, and answer the first exchange of the first `to_answer` rows.

    A row whose prompt leaves no room for an answer within the model's positions is not answered.

    console: a terminal to show progress on.
    on_bad_row: what to do with rows that the prompt format rejects.

    Raises:
        DataError: no row has a response within `data.max_length`, or the prompt format rejects one.
        ModelError: the rows use a token that the model has no embedding for.
        MachineError: not enough memory even for one row.
    """
    encoder = assistant.encoder.limited_to(assistant.positions)
    if encoder is not assistant.encoder:
        logger.warning(
            "rows are cut at the %d tokens that the model supports, not at data.max_length=%d",
            encoder.max_length, assistant.encoder.max_length,
        )  # fmt: skip
        assistant = replace(assistant, encoder=encoder)
    found = _examples(assistant, rows, on_bad_row)
    if not found:
        raise DataError(
            f"none of the {len(rows)} rows has any of its response within data.max_length="
            f"{assistant.encoder.max_length} tokens"
        )
    examples = [example for _, each in found for example in each]
    losses = measure(assistant, examples, console).together([len(each) for _, each in found])
    measured = [row for row, _ in found]
    fitting = (sample for sample in samples_of(measured) if assistant.fits(sample.question))
    answered, scores = _answered(assistant, list(itertools.islice(fitting, to_answer)), console)
    return Evaluation(
        measured, len(rows) - len(found), losses, measure(assistant, general_examples(assistant)),
        answered, scores,
    )  # fmt: skip


def _examples(
    assistant: Assistant, rows: Sequence[Row], on_bad_row: Literal["fail", "skip"]
) -> list[tuple[Row, list[Example]]]:
    """The rows that have a label to learn, with their examples."""
    pairs = list(zip(rows, assistant.encoder.by_row(rows), strict=True))
    problems = [Problem(row.file, row.number, *found) for row, found in pairs if isinstance(found, Flaw)]
    good = [(row, found) for row, found in pairs if not isinstance(found, Flaw)]
    if problems:
        require_good(Rows([row for row, _ in good], problems, "", [], [], len(problems), len(problems)), on_bad_row)
        logger.warning(
            "%d rows are skipped because the prompt format rejects them, such as %s", len(problems), problems[0]
        )
    every = (token for _, found in good for example in found for token in example.input_ids)
    assistant.encoder.check_embedding(max(every, default=0), assistant.model.config.vocab_size)
    return [(row, found) for row, found in good if found]


def general_examples(assistant: Assistant) -> list[Example]:
    """The general text as plain text: every token but the first is predicted.

    It is cut only at the model's positions, so that all runs on one base can be compared, whatever their max_length.
    """
    texts = [entry["text"] for entry in json.loads(GENERAL.read_text(encoding="utf-8"))]
    every = [assistant.encoder.encode_text(text)[: assistant.positions] for text in texts]
    return [Example(ids, ids) for ids in every]


def _answered(
    assistant: Assistant, samples: Sequence[Sample], console: Console | None
) -> tuple[list[dict[str, str]], dict[str, Scores]]:
    if not samples:
        return [], {}
    questions = [sample.question for sample in samples]
    with assistant.untuned():
        before = answers(assistant, questions, LONGEST_ANSWER, console=console)
    after = answers(assistant, questions, LONGEST_ANSWER, console=console)
    expected = [sample.expected for sample in samples]
    texts = [
        {"system": sample.system, "instruction": sample.instruction, "input": sample.input,
         "expected": sample.expected, "before": old.text, "after": new.text}
        for sample, old, new in zip(samples, before, after, strict=True)
    ]  # fmt: skip
    return texts, {
        name: Scores(
            chrf([answer.text for answer in given], expected),
            sum(a.text.split() == e.split() for a, e in zip(given, expected, strict=True)) / len(given),
            sum(answer.finished for answer in given) / len(given),
        )
        for name, given in (("before", before), ("after", after))
    }


def chrf(given: Sequence[str], expected: Sequence[str]) -> float | None:
    """chrF of a list of answers, 0 to 100 (Popović 2015, by sacrebleu); None if sacrebleu is not installed."""
    try:
        from sacrebleu.metrics.chrf import CHRF
    except ImportError:
        return None
    return CHRF().corpus_score(list(given), [list(expected)]).score


def show(console: Console, evaluation: Evaluation) -> None:
    """Print the numbers as a table, then the rows with the highest loss."""
    table = Table()
    for column in ("", "before", "after", "change"):
        table.add_column(column, no_wrap=True)
    for name, losses in (("loss", evaluation.losses), ("general text", evaluation.general)):
        table.add_row(name, str(losses.mean_before), str(losses.mean_after), str(losses.change))
        if name == "loss":
            table.add_row(
                "perplexity", *(_interval(mean.perplexity) for mean in (losses.mean_before, losses.mean_after)), ""
            )
    for name, of in (("chrF", "chrf"), ("exact answers", "exact"), ("answers that end", "finished")):
        values = [getattr(scores, of) for scores in evaluation.scores.values()]
        if values and values[0] is not None:
            table.add_row(name, *((f"{v:.1f}" if of == "chrf" else f"{v:.0%}") for v in values), "")
    console.print(table)
    left_out = f", {evaluation.left_out} without a response within the length left out" if evaluation.left_out else ""
    console.print(
        f"{len(evaluation.rows)} rows{left_out}, {len(evaluation.answers)} answered; losses in nats a token, ± 95 % "
        "confidence over rows; general text: not part of the training"
    )
    if len(evaluation.rows) < FEW:
        console.print(f"fewer than {FEW} rows: the intervals are rough, and tend to be too narrow")
    console.print("highest losses after training:")
    for index in evaluation.worst():
        row, losses = evaluation.rows[index], evaluation.losses
        before, after = (part[index] / losses.tokens[index] for part in (losses.before, losses.after))
        first = " ".join((row.text or row.exchanges[0].instruction).split())[:60]
        place = f"  {after:.3f} (before {before:.3f})  {row.file}, row {row.number}: {first}"
        console.print(place)


def _interval(mean: Mean) -> str:
    return _short(mean.value) + ("" if math.isnan(mean.low) else f" ({_short(mean.low)}–{_short(mean.high)})")


def _short(perplexity: float) -> str:
    """Three digits, so that the table fits a terminal."""
    return (
        f"{perplexity:.{2 if perplexity < 9.995 else 1 if perplexity < 99.95 else 0}f}" if perplexity < 1e5 else "> 1e5"
    )


def save(evaluation: Evaluation, target: Path, **facts: str) -> None:
    """Write a new folder, whole or not at all: summary.json, rows.jsonl (a loss a row), answers.jsonl.

    facts: more fields of the summary.

    Raises:
        MachineError: the disk is full or not writable.
    """
    make_parent(target)
    with whole_folder(target) as folder:
        summary = facts | _summary(evaluation)
        texts = {SUMMARY: json.dumps(summary, indent=2, ensure_ascii=False) + "\n"}
        for name, lines in (("rows.jsonl", _row_lines(evaluation)), ("answers.jsonl", evaluation.answers)):
            texts[name] = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")


def save_harness(scores: HarnessScores, target: Path) -> None:
    """Write a new folder, whole or not at all, with the harness's scores in summary.json.

    Raises:
        MachineError: the disk is full or not writable.
    """
    make_parent(target)
    with whole_folder(target) as folder:
        (folder / SUMMARY).write_text(json.dumps({"harness": scores}, indent=2) + "\n", encoding="utf-8")


def _row_lines(evaluation: Evaluation) -> list[dict[str, str | float | None]]:
    losses = evaluation.losses
    return [
        {"file": row.file, "row": row.number, "tokens": tokens, "loss_before": _finite(before / tokens),
         "loss_after": _finite(after / tokens)}
        for row, before, after, tokens in zip(evaluation.rows, losses.before, losses.after, losses.tokens, strict=True)
    ]  # fmt: skip


def _summary(evaluation: Evaluation) -> dict[str, object]:
    return {
        "rows": len(evaluation.rows),
        "rows_left_out": evaluation.left_out,
        "tokens": sum(evaluation.losses.tokens),
        "loss": _losses_as_json(evaluation.losses),
        "general_loss": _losses_as_json(evaluation.general),
        "answers": {name: asdict(scores) for name, scores in evaluation.scores.items()},
    }


def _losses_as_json(losses: Losses) -> dict[str, object]:
    def of(mean: Mean) -> dict[str, float | None]:
        return {name: _finite(value) for name, value in asdict(mean).items()}

    before, after = losses.mean_before, losses.mean_after
    perplexity = {"before": of(before.perplexity), "after": of(after.perplexity)}
    return {"before": of(before), "after": of(after), "change": of(losses.change), "perplexity": perplexity}


def _finite(value: float) -> float | None:
    """None for infinity and NaN, which JSON does not have."""
    return value if math.isfinite(value) else None
