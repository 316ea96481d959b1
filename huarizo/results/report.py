"""The loss curves and the summary of a run."""

import io
import re
from collections.abc import Mapping, Sequence

from rich.console import Console

from huarizo.console import program, without_controls
from huarizo.files import write_whole
from huarizo.inference.samples import Sample, show_samples
from huarizo.runs import Run

MetricsRow = Mapping[str, float | None]
"""A line of metrics.jsonl; null stands for a number that is not finite."""


def save_loss_plot(run: Run, metrics: Sequence[MetricsRow]) -> None:
    """Write loss.png: training loss by step, its running mean, and the held-out loss where measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    training, heldout = _curve(metrics, "loss"), _curve(metrics, "eval_loss")
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


def _curve(metrics: Sequence[MetricsRow], name: str) -> list[tuple[float, float]]:
    """(step, value) of the rows that have this value."""
    pairs = ((row.get("step"), row.get(name)) for row in metrics)
    return [(step, value) for step, value in pairs if step is not None and value is not None]


def heldout_change(metrics: Sequence[MetricsRow]) -> tuple[float, float] | None:
    """Held-out loss before the first and after the last step; None if one was not measured or is not finite."""
    losses = [row["eval_loss"] for row in metrics if "eval_loss" in row]
    if len(losses) < 2 or losses[0] is None or losses[-1] is None:
        return None
    return losses[0], losses[-1]


def fenced(text: str) -> str:
    """A text as a Markdown code block. Its fence is longer than any run of backticks in it, so no text ends it."""
    text = without_controls(text)
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall(r"`+", text)), 3)
    return f"{fence}text\n{text}\n{fence}"


def show_summary(
    console: Console, run: Run, metrics: Sequence[MetricsRow], samples: list[Sample], in_gguf: bool
) -> None:
    """Print answers, losses, speed and files of a finished run, and what to do next.

    in_gguf: whether the tuned model can be written as GGUF.
    """
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
            f"{last['memory_gb']:.1f} GB peak memory",
            soft_wrap=True,
        )
    console.print(f"adapter {run.adapter}, curves {run.loss_plot}, answers {run.samples}", soft_wrap=True)
    console.print("next:")
    file = f"export {run.path} --ollama --verify", "a verified file for llama.cpp and Ollama"
    for arguments, what in (
        (f"chat {run.path}", "chat with it"),
        (f"eval {run.path}", "how good it is, and what it forgot"),
        file if in_gguf else (f"merge {run.path}", "base and adapter as one ordinary model folder"),
    ):
        console.print(f"  {program()} {arguments}    {what}", soft_wrap=True)
