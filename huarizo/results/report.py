"""What a finished run shows: the loss curves, the answers before and after, the summary."""

import io
import json
import re
from dataclasses import asdict, dataclass, fields
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from huarizo.console import program, without_controls
from huarizo.data.prompts import OpenExchange, Question, user_text
from huarizo.data.rows import Row
from huarizo.files import write_whole
from huarizo.runs import Run


@dataclass(frozen=True)
class Sample:
    """The same prompt answered before and after training.

    `before` is empty until the base, and `after` None until the tuned model has answered; `expected` is the row's own
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


def sample_of(row: Row) -> Sample:
    """A row's first exchange, to be answered."""
    first = row.exchanges[0]
    return Sample(first.instruction, first.input, "", None, first.output, row.system)


def samples_as_text(samples: list[Sample]) -> str:
    """The content of samples.jsonl: one JSON object a prompt."""
    rows = ({"prompt": sample.prompt, **asdict(sample)} for sample in samples)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def save_loss_plot(run: Run, metrics: list[dict[str, Any]]) -> None:
    """loss.png: training loss by step (and its running mean), held-out loss where it was measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    training = [(row["step"], row["loss"]) for row in metrics if row.get("loss") is not None]
    heldout = [(row["step"], row["eval_loss"]) for row in metrics if row.get("eval_loss") is not None]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss", title=run.path.name)
    if training:
        axes.plot(*zip(*training, strict=True), color="#c9a27a", linewidth=0.8, label="training, each step")
        smooth, mean = [], training[0][1]
        for step, loss in training:
            mean = 0.9 * mean + 0.1 * loss
            smooth.append((step, mean))
        axes.plot(*zip(*smooth, strict=True), color="#8a5a2b", label="training, running mean")
    if heldout:
        axes.plot(*zip(*heldout, strict=True), "o-", color="#2b5f8a", label="held out")
    if training or heldout:
        axes.legend()
    axes.grid(alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_whole(run.loss_plot, image.getvalue())


def heldout_change(metrics: list[dict[str, Any]]) -> tuple[float, float] | None:
    """Held-out loss before the first and after the last step, where it was measured."""
    losses = [row["eval_loss"] for row in metrics if row.get("eval_loss") is not None]
    return (losses[0], losses[-1]) if len(losses) > 1 else None


def fenced(text: str) -> str:
    """A text as a code block that nothing in the text can end: its fence is longer than any run of backticks in it."""
    text = without_controls(text)
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall(r"`+", text)), 3)
    return f"{fence}text\n{text}\n{fence}"


def samples_from_text(text: str) -> list[Sample]:
    """`samples_as_text`, read back.

    Raises:
        ValueError, TypeError: it is something else.
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


def show_summary(console: Console, run: Run, metrics: list[dict[str, Any]], samples: list[Sample]) -> None:
    """The end of a run: losses, speed, answers, files, and what to do next."""
    if samples:
        show_samples(console, samples)
    change = heldout_change(metrics)
    if change:
        console.print(f"held-out loss {change[0]:.4f} before, {change[1]:.4f} after")
    steps = [row for row in metrics if row.get("loss") is not None]
    if steps:
        last = steps[-1]
        console.print(
            f"{last['step']} steps, {last['tokens']:,} tokens, {last['tokens_per_second']:.0f} tokens/s, "
            f"{last['memory_gb']:.1f} GB at most",
            soft_wrap=True,
        )
    console.print(f"adapter {run.adapter}, curves {run.loss_plot}, answers {run.samples}", soft_wrap=True)
    console.print("next:")
    for arguments, what in (
        (f"chat {run.path}", "talk with it"),
        (f"eval {run.path}", "what it is worth, and what it forgot"),
        (f"export {run.path} --ollama --verify", "a file for llama.cpp and Ollama, tried"),
    ):
        console.print(f"  {program()} {arguments}    {what}", soft_wrap=True)
