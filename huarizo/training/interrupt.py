"""Ctrl-C, SIGTERM and a lost terminal end a run within seconds, without losing what was trained.

When a signal takes effect depends on what it would interrupt. While a model loads, is evaluated or answers: at once.
During a step: after the step, or after GRACE seconds if the step takes longer, as one that compiles does. While weights
or a checkpoint are being written: once they are. A second signal always takes effect at once.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], object] | int | None
"""What `signal.signal` takes and returns."""
GRACE = 3.0  # seconds left to the step that is being computed


class Stopped(KeyboardInterrupt):
    """A signal interrupted the current work, which is abandoned."""


class Signals:
    """Handles signals within `with Signals() as signals:`. They take effect at once, except inside `patience`."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._patience: float | None = 0.0
        self._before: dict[signal.Signals, Handler] = {}

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
        """Within the block, delay signals by this many seconds: 0 is at once, None until the block ends.

        Raises:
            Stopped: a signal takes effect. On entering and leaving the block, also one that arrived earlier.
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
        """Schedule SIGALRM; 0 cancels it. Off POSIX there is no such timer, and a signal waits for the step to end."""
        if not hasattr(signal, "setitimer"):
            return
        if seconds and signal.SIGALRM not in self._before:
            self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._alarm)
        if signal.SIGALRM in self._before:
            signal.setitimer(signal.ITIMER_REAL, seconds)

    def _alarm(self, number: int, frame: FrameType | None) -> None:
        if self._patience:
            raise Stopped
