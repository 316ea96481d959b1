"""The same prompts answered before and after training: taken from rows, kept in samples.jsonl, shown side by side."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields

from rich.console import Console
from rich.table import Table
from rich.text import Text

from huarizo.data.prompts import OpenExchange, Question, user_text
from huarizo.data.rows import Row


@dataclass(frozen=True)
class Sample:
    """The same prompt answered before and after training.

    `before` is empty until the base has answered; `after` is None until the tuned model has. `expected` is the row's
    answer, or empty.
    """

    instruction: str
    input: str
    before: str
    after: str | None
    expected: str = ""
    system: str = ""

    @property
    def question(self) -> Question:
        return Question(OpenExchange(self.instruction, self.input), self.system)

    @property
    def prompt(self) -> str:
        return user_text(self.question.turn)


def samples_of(rows: Iterable[Row]) -> Iterator[Sample]:
    """The rows' first exchanges as samples. Skips plain texts, and rows with tools, as nothing would run them."""
    for row in rows:
        if row.exchanges and not row.tools and not row.exchanges[0].calls:
            first = row.exchanges[0]
            yield Sample(first.instruction, first.input, "", None, first.output, row.system)


def samples_as_text(samples: list[Sample]) -> str:
    """The content of samples.jsonl: one JSON object a prompt."""
    rows = ({"prompt": sample.prompt, **asdict(sample)} for sample in samples)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def samples_from_text(text: str) -> list[Sample]:
    """Read back what `samples_as_text` wrote.

    Raises:
        ValueError, TypeError: the text is something else.
    """
    rows = [json.loads(line) for line in text.split("\n") if line]
    texts = [{field.name: row[field.name] for field in fields(Sample) if field.name in row} for row in rows]
    if any(not isinstance(text, str | None) for each in texts for text in each.values()):
        raise ValueError("a prompt or an answer is not a text")
    return [Sample(**each) for each in texts]


def show_samples(console: Console, samples: list[Sample]) -> None:
    """The answers side by side."""
    table = Table(show_lines=True, expand=console.is_terminal)
    for column in ("prompt", "before", "after"):
        table.add_column(column, ratio=1, overflow="fold")
    for sample in samples:
        table.add_row(*(Text(text) for text in (sample.prompt, sample.before, sample.after or "")))
    console.print(table)
