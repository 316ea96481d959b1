"""Prepares the data of a run: reads and checks files, splits off held-out rows, and tokenises both."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from huarizo.data.notes import Notes, Places
from huarizo.data.prompts import prompt_format
from huarizo.data.rows import Problem, Row, Rows, read_rows, require_good
from huarizo.data.tokens import Encoder, TokenisedRows, require_examples, tokenise
from huarizo.errors import DataError
from huarizo.recipe import DataRecipe

if TYPE_CHECKING:
    from huarizo.data.templates import Tokenizer


@dataclass(frozen=True)
class Data:
    """Tokenised rows, with the rows and settings that they were made from. `heldout` is None if nothing is held out."""

    encoder: Encoder
    rows: list[Row]
    train: TokenisedRows
    heldout_rows: list[Row]
    heldout: TokenisedRows | None
    problems: list[Problem]
    bad_row_count: int
    format: str
    notes: list[str]
    """Remarks on the rows for the user, a line each."""


def split(rows: list[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split rows into (trained, held out), each in file order.

    Args:
        rows: all good rows.
        share: below 1, the fraction of the rows to hold out; otherwise, their number.
        seed: decides which rows are held out.

    Raises:
        DataError: no row would be left to train on.
    """
    count = int(share) if share >= 1 else max(round(len(rows) * share), 1 if share and len(rows) > 1 else 0)
    if count >= len(rows):
        raise DataError(
            f"data.eval={share:g} holds out {count} of {len(rows)} rows, which leaves none. Use a smaller data.eval"
        )
    chosen = set(random.Random(seed).sample(range(len(rows)), count))
    return [r for i, r in enumerate(rows) if i not in chosen], [r for i, r in enumerate(rows) if i in chosen]


def _overlap_note(rows: list[Row], heldout_rows: list[Row]) -> list[str]:
    """A note on the held-out rows that are also trained on, if there are any."""
    trained = {_content(row) for row in rows}
    places = Places()
    for row in heldout_rows:
        if _content(row) in trained:
            places.add(row.file, row.number)
    if not places.count:
        return []
    return [
        f"{places.count} of {len(heldout_rows)} held-out rows are also trained on, which makes the held-out loss "
        f"too low: {places}"
    ]


def _content(row: Row) -> str:
    return repr(replace(row, file="", number=0))


def prepare_data(
    recipe: DataRecipe, seed: int, train: Path | Sequence[Path], evaluated: Path | Sequence[Path] | None,
    tokenizer: "Tokenizer", cache: Path,
) -> Data:  # fmt: skip
    """Prepare the data that the recipe's `data` section describes.

    Args:
        recipe: the `data` section.
        seed: decides which rows are held out.
        train: the files to train on.
        evaluated: the held-out files, if `data.eval` names some.
        tokenizer: of the model.
        cache: the folder for tokenised rows.

    Raises:
        DataError: rows can't be used; the message names file, row, field and remedy.
        RecipeError: the prompt format does not fit the model.
    """
    prompt = prompt_format(recipe.prompt, tokenizer, recipe.eos, recipe.date, recipe.special_tokens or ())
    encoder = Encoder(tokenizer, prompt, recipe.labels, recipe.max_length)
    read = read_rows(train, recipe.columns)
    rows, heldout_rows, problems = require_good(read, recipe.on_bad_row), [], list(read.problems)
    bad_row_count, notes = read.bad_row_count, read.notes
    if evaluated:
        read_eval = read_rows(evaluated, recipe.columns)
        heldout_rows = require_good(read_eval, recipe.on_bad_row)
        problems += read_eval.problems
        bad_row_count += read_eval.bad_row_count
        notes = notes + read_eval.notes
    elif isinstance(recipe.eval, int | float) and recipe.eval:
        rows, heldout_rows = split(rows, recipe.eval, seed)
    notes = list(dict.fromkeys([*notes, *_overlap_note(rows, heldout_rows), *_stop_token_note(rows, prompt.stop)]))
    trained = tokenise(rows, encoder, cache)
    heldout = tokenise(heldout_rows, encoder, cache) if heldout_rows else None
    refused = _refused_rows(rows, trained, recipe)
    if heldout is not None:
        refused += _refused_rows(heldout_rows, heldout, recipe)
        heldout_rows = [row for index, row in enumerate(heldout_rows) if index not in heldout.refused]
    return Data(
        encoder, rows, trained, heldout_rows, heldout, [*problems, *refused],
        bad_row_count + len(refused), read.format, notes,
    )  # fmt: skip


def _refused_rows(rows: list[Row], tokenised: TokenisedRows, recipe: DataRecipe) -> list[Problem]:
    """The problems of rows that the prompt format can't write.

    Raises:
        DataError: the recipe doesn't let them be left out, or nothing is left without them.
    """
    problems = [Problem(rows[index].file, rows[index].number, *flaw) for index, flaw in tokenised.refused.items()]
    good = [row for index, row in enumerate(rows) if index not in tokenised.refused]
    require_good(Rows(good, problems, "", [], [], len(problems), len(problems)), recipe.on_bad_row)
    require_examples(tokenised, len(good), recipe.max_length)
    return problems


def _stop_token_note(rows: list[Row], stop: str) -> list[str]:
    """A note on answers that contain the stop token as text, if there are any."""
    notes = Notes()
    for row in rows:
        if stop and any(stop in exchange.output for exchange in row.exchanges):
            notes.add_remark(
                f"{stop} is written out in an answer, and learnt as plain text there", row.file, row.number
            )
    return notes.lines()
