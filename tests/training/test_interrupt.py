"""The first signal is noted, the second takes effect at once."""

import os
import signal

import pytest

from huarizo.training.interrupt import Signals


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_are_noted_once_and_then_end_at_once(number: str) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals, signals.patience(None):
        os.kill(os.getpid(), getattr(signal, number))
        assert signals.received == number
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        signals.received = None
    assert signal.getsignal(signal.SIGTERM) is before
