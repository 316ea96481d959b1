"""The events of a run. Each one is handed to all listeners; one of them appends it to events.jsonl.

The terminal is a listener, and so is metrics.jsonl. A run reports everything as events, so nothing that was printed is
lost to someone who looks later. A line of events.jsonl is one JSON object: `event` is the kind, `time` the time in UTC,
and the other keys are the fields of the class below.
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
    """A fact about the run, such as its device or data, with a short title or none."""

    kind: ClassVar[str] = "noted"
    text: str
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class Warned(Event):
    """Something is wrong, but the run continues."""

    kind: ClassVar[str] = "warned"
    text: str


@dataclass(frozen=True, kw_only=True)
class Started(Event):
    """Training starts after `step` of `max_steps` optimizer steps: 0 in a new run."""

    kind: ClassVar[str] = "started"
    step: int
    max_steps: int


@dataclass(frozen=True, kw_only=True)
class Compiled(Event):
    """The decoder layers were compiled during the first step."""

    kind: ClassVar[str] = "compiled"
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Step(Event):
    """A logged optimizer step. Values that are not finite are None.

    loss: mean over the labelled tokens, in nats; tokens: trained on so far; elapsed_s: seconds of training so far;
    eta_s: estimated seconds to the last step, None until known; memory_gb: peak so far, in 10^9 bytes.
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
    """The held-out loss after a step, in nats per token; None if it is not finite."""

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
    """A step was skipped, because its loss or gradients were not finite; no weight changed."""

    kind: ClassVar[str] = "skipped"
    step: int
    in_a_row: int


@dataclass(frozen=True, kw_only=True)
class OutOfMemory(Event):
    """Memory ran out in a step, which is repeated with smaller micro-batches."""

    kind: ClassVar[str] = "out of memory"
    step: int
    micro_batch_tokens: int


@dataclass(frozen=True, kw_only=True)
class Stopped(Event):
    """The run ends early; `reason` says why and what was saved."""

    kind: ClassVar[str] = "stopped"
    reason: str


@dataclass(frozen=True, kw_only=True)
class Done(Event):
    """The run is complete: the adapter and the answers are there."""

    kind: ClassVar[str] = "done"
    adapter: str


Listener = Callable[[Event], None]


class UnwrittenError(Exception):
    """A listener can't write an event to its file. The run continues without it."""


class EventFile:
    """The listener that writes events.jsonl. A resumed run appends to it."""

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
    """Where a run reports its events: each goes to all listeners, in order."""

    def __init__(self, listeners: Iterable[Listener] = ()) -> None:
        self.listeners = list(listeners)
        self._failed: set[int] = set()  # indices of listeners

    def add(self, event: Event) -> None:
        """Hand an event to all listeners. A listener's first failure to write its file is reported as a warning."""
        failures = []
        for place, listener in enumerate(self.listeners):
            try:
                listener(event)
            except UnwrittenError as error:
                failures += [error] if place not in self._failed else []
                self._failed.add(place)
        if isinstance(event, Stopped | Done):
            return  # the run is over: a file that can't be written no longer matters
        for failure in failures:
            self.warn(f"{failure}. Continuing without it")

    def note(self, title: str, text: str) -> None:
        """Report a fact under a title; "" for none."""
        self.add(Noted(title=title, text=text))

    def warn(self, text: str) -> None:
        """Report that something is wrong."""
        self.add(Warned(text=text))
