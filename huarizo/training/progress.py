"""The listener that shows a run's events: a live progress bar on a terminal, plain lines elsewhere."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from huarizo.console import PlainConsole
from huarizo.events import Compiled, Evaluated, Event, Noted, OutOfMemory, Saved, Started, Step, Warned

PLAIN_SECONDS = 10  # between two step lines without a terminal


def duration(seconds: float) -> str:
    """`1:02:03`, `2:03` or `0:03`."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def step_line(step: Step) -> str:
    """A step on one line: loss, learning rate, speed, time and memory."""
    loss = "not finite, step skipped" if step.loss is None else f"{step.loss:.4f}"
    left = f", {duration(step.eta_s)} left" if step.eta_s is not None else ""
    return (
        f"loss {loss}  lr {step.lr:.1e}  {step.tokens_per_second or 0:.0f} tokens/s  "
        f"{duration(step.elapsed_s)} elapsed{left}  {step.memory_gb:.1f} GB"
    )


class Terminal:
    """Shows events on a console. `close` ends the progress bar."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.last_line = 0.0
        self.bar: Progress | None = None
        self.task = TaskID(0)

    @property
    def reader_left(self) -> bool:
        """Whether the reader of standard output has closed it."""
        return isinstance(self.console, PlainConsole) and self.console.closed

    def __call__(self, event: Event) -> None:
        match event:
            case Noted():
                self._print(f"{event.title:<10} {event.text}" if event.title else event.text)
            case Warned():
                self._print(event.text, "yellow")
            case Started():
                self._open_bar(event)
            case Compiled():
                self._print(f"{'compiled':<10} in {event.seconds:.0f} s; most of it is cached for the next run")
            case Step():
                self._show_step(event)
            case Evaluated():
                loss = "not finite" if event.eval_loss is None else f"{event.eval_loss:.4f}"
                self._print(f"step {event.step}: held-out loss {loss}")
            case Saved():
                self._print(f"saved step {event.step}")
            case OutOfMemory():
                self._print(
                    f"out of memory: continuing with micro-batches of {event.micro_batch_tokens} tokens", "yellow"
                )
            case _:
                pass  # a skipped step shows in its step line; the command reports how the run ended

    def _print(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style), soft_wrap=True)

    def _open_bar(self, started: Started) -> None:
        if self.console.is_terminal and self.bar is None:
            counts = TextColumn("{task.completed}/{task.total} {task.description}")
            self.bar = Progress(TextColumn("training"), BarColumn(), counts, console=self.console, transient=True)
            self.bar.start()
            self.task = self.bar.add_task("", total=started.max_steps, completed=started.step)

    def _show_step(self, step: Step) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=step.step, description=step_line(step))
        elif step.step in (1, step.max_steps) or time.perf_counter() - self.last_line >= PLAIN_SECONDS:
            self.last_line = time.perf_counter()
            self._print(f"step {step.step}/{step.max_steps}  {step_line(step)}")

    def close(self) -> None:
        """End the progress bar."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
