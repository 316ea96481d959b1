"""What happens in a run, one event after another: kept in events.jsonl, and handed to whoever listens.

The terminal is one listener, metrics.jsonl another. All that a run has to say goes through here, so that nothing is
lost to someone who looks at the run later. A line of events.jsonl is one JSON object: `event` is the kind, `time` the
moment in UTC, and the other keys are the fields of the kind's class below.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

from huarizo.files import append_line


@dataclass(frozen=True, kw_only=True)
class Event:
    """One thing that happened."""

    kind: ClassVar[str]


@dataclass(frozen=True, kw_only=True)
class Noted(Event):
    """A fact about the run, such as its device or its data, under a short title; or a line without one."""

    kind: ClassVar[str] = "noted"
    text: str
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class Warned(Event):
    """Something is not as it should be; the run goes on."""

    kind: ClassVar[str] = "warned"
    text: str


@dataclass(frozen=True, kw_only=True)
class Started(Event):
    """Training begins behind `step` of `max_steps` optimizer steps; 0 for a new run."""

    kind: ClassVar[str] = "started"
    step: int
    max_steps: int


@dataclass(frozen=True, kw_only=True)
class Compiled(Event):
    """The decoder layers were compiled within the first step."""

    kind: ClassVar[str] = "compiled"
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Step(Event):
    """A logged optimizer step. What is not a finite number is None.

    loss: mean of the labelled tokens, in nats; tokens: of the rows so far; memory_gb: the most used so far, in 10^9
    bytes; eta_s: seconds to the last step, None while that is not known.
    """

    kind: ClassVar[str] = "step"
    step: int
    max_steps: int
    epoch: float
    loss: float | None
    lr: float
    grad_norm: float | None
    tokens: int
    tokens_per_second: float | None
    elapsed_s: float
    eta_s: float | None
    memory_gb: float
    skipped_steps: int


@dataclass(frozen=True, kw_only=True)
class Evaluated(Event):
    """The held-out loss behind a step, in nats a token; None where it is not finite."""

    kind: ClassVar[str] = "evaluated"
    step: int
    epoch: float
    eval_loss: float | None


@dataclass(frozen=True, kw_only=True)
class Saved(Event):
    """The checkpoint of a step is on disk and was read back."""

    kind: ClassVar[str] = "saved"
    step: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Skipped(Event):
    """A step changed no weight, because its loss or gradients were not finite."""

    kind: ClassVar[str] = "skipped"
    step: int
    in_a_row: int


@dataclass(frozen=True, kw_only=True)
class OutOfMemory(Event):
    """Memory gave out in a step, which is computed again with smaller micro-batches."""

    kind: ClassVar[str] = "out of memory"
    step: int
    micro_batch_tokens: int


@dataclass(frozen=True, kw_only=True)
class Stopped(Event):
    """The run ends before its last step; `reason` says why and what was kept."""

    kind: ClassVar[str] = "stopped"
    reason: str


@dataclass(frozen=True, kw_only=True)
class Done(Event):
    """The run is complete: the adapter and the answers are there."""

    kind: ClassVar[str] = "done"
    adapter: str


Listener = Callable[[Event], None]


class UnwrittenError(Exception):
    """A listener can't write an event into its file. The run goes on without it."""


class EventFile:
    """The listener that keeps events.jsonl. A resumed run goes on writing it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, event: Event) -> None:
        """Raises UnwrittenError."""
        row = {"event": event.kind, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), **asdict(event)}
        try:
            append_line(self.path, json.dumps(row, ensure_ascii=False))
        except OSError as error:
            raise UnwrittenError(f"{self.path}: {error}") from error


class Events:
    """The one place that a run reports to: each event goes to all listeners, in their order."""

    def __init__(self, listeners: Iterable[Listener] = ()) -> None:
        self.listeners = list(listeners)
        self._failed: set[int] = set()  # listeners, by place

    def add(self, event: Event) -> None:
        """Hand an event on. Of a listener that can't write its file, the first failure is reported as a warning."""
        failures = []
        for place, listener in enumerate(self.listeners):
            try:
                listener(event)
            except UnwrittenError as error:
                failures += [error] if place not in self._failed else []
                self._failed.add(place)
        for failure in failures:
            self.warn(f"{failure}. Going on without it")

    def note(self, title: str, text: str) -> None:
        """Report a fact under a title."""
        self.add(Noted(title=title, text=text))

    def warn(self, text: str) -> None:
        """Report what is not as it should be."""
        self.add(Warned(text=text))
