"""metrics.jsonl: one row for each logged step and each held-out loss.

The rows in memory are authoritative, and each checkpoint has a copy. The file is written line by line as they come. A
resumed run rewrites it from the rows of its checkpoint.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huarizo.events import Evaluated, Event, Step, UnwrittenError
from huarizo.files import append_line, write_whole

Row = dict[str, Any]
"""The fields of an `events.Step` or `events.Evaluated`, as JSON values."""


class Metrics:
    """The listener that records metrics. `path` is None in processes that write no files."""

    def __init__(self, path: Path | None, rows: Sequence[Row] = ()) -> None:
        """rows: those of the checkpoint that the run is resumed from."""
        self.path, self.rows = path, list(rows)
        self.unwritten = False
        self._write_whole()

    def __call__(self, event: Event) -> None:
        """Record an event. Raises UnwrittenError: the row is in memory, but not in the file."""
        if isinstance(event, Evaluated):
            self.rows.append(asdict(event))
        elif isinstance(event, Step):
            row = asdict(event)
            del row["max_steps"]
            if not event.skipped_steps:
                del row["skipped_steps"]
            self.rows.append(row)
        else:
            return
        if self.path is None:
            return
        try:
            append_line(self.path, json.dumps(self.rows[-1]))
        except OSError as error:
            self.unwritten = True
            raise UnwrittenError(f"{self.path}: {error}") from error

    def complete(self) -> None:
        """Rewrite the file if a line could not be written.

        Raises:
            MachineError: it still can't be written.
        """
        if self.unwritten:
            self._write_whole()
            self.unwritten = False

    def _write_whole(self) -> None:
        if self.path is not None:
            write_whole(self.path, self.as_text())

    def as_text(self) -> str:
        """The rows as the file's content."""
        return "".join(json.dumps(row) + "\n" for row in self.rows)

    def heldout_loss(self, step: int) -> float | None:
        """The held-out loss at a step; None if it was not measured or is not finite."""
        return next((row["eval_loss"] for row in reversed(self.rows) if _is_heldout(row, step)), None)

    def has_heldout(self, step: int) -> bool:
        """Whether the held-out loss was measured at a step."""
        return any(_is_heldout(row, step) for row in self.rows)

    @property
    def lowest_heldout(self) -> float:
        """The lowest held-out loss so far; infinity if there is none."""
        return min((row["eval_loss"] for row in self.rows if row.get("eval_loss") is not None), default=math.inf)

    @property
    def elapsed_s(self) -> float:
        """Seconds of training so far, including those before a resume."""
        return max((row.get("elapsed_s") or 0 for row in self.rows), default=0)


def _is_heldout(row: Row, step: int) -> bool:
    return row["step"] == step and "eval_loss" in row
