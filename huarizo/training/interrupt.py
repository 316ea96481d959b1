"""Ctrl-C, SIGTERM and a lost terminal end a run within seconds, and nothing that was trained is lost.

How soon a signal acts depends on what it would cut off: at once while a model loads, is evaluated or answers; behind
the step that is being computed, unless that takes long, as with compilation; and never while weights or a checkpoint
change. A second signal always acts at once.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

GRACE = 3.0  # seconds for the step that is being computed


class Stopped(KeyboardInterrupt):
    """A signal acts in the midst of something. What was going on is given up."""


class Signals:
    """Within `with Signals() as signals:` they act as `patience` says, which is at once to begin with."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._patience: float | None = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Signals":
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            if number := getattr(signal, name, None):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def patience(self, seconds: float | None) -> Iterator[None]:
        """Within the block a signal acts after so many seconds: 0 is at once, None not before the block ends.

        Raises:
            Stopped: where it acts; also on entering and leaving, of one that came before.
        """
        before, self._patience = self._patience, seconds
        try:
            self._act_if_due()
            yield
        finally:
            self._wake_after(0)
            self._patience = before
        self._act_if_due()

    def _act_if_due(self) -> None:
        if self.received is not None and self._patience == 0:
            raise Stopped

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
        self._act_if_due()
        if self._patience:
            self._wake_after(self._patience)

    def _wake_after(self, seconds: float) -> None:
        """Have SIGALRM come; 0 takes it back. Elsewhere than on POSIX there is none, and the step is waited for."""
        if not hasattr(signal, "setitimer"):
            return
        if seconds and signal.SIGALRM not in self._before:
            self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._alarm)
        if signal.SIGALRM in self._before:
            signal.setitimer(signal.ITIMER_REAL, seconds)

    def _alarm(self, number: int, frame: FrameType | None) -> None:
        if self._patience:
            raise Stopped
