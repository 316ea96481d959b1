"""Bounds on what foreign text may cost: a chat template that loops, a Parquet file that unfolds into terabytes.

Jinja's sandbox keeps a template from reaching anything, but not from running for hours or filling the memory.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

try:
    import resource
except ImportError:  # Windows
    resource = None


class TooLongError(Exception):
    """The time is up."""


@contextmanager
def bounded_time(seconds: float) -> Iterator[None]:
    """Ends the block with TooLongError after so many seconds. Only where signals arrive: in the main thread."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise TooLongError(f"more than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def bounded_memory(more: int) -> Iterator[None]:
    """Lets the process have `more` bytes of address space than it has now; beyond, MemoryError is raised in the block.

    Linux only; elsewhere there is no bound.
    """
    statm = Path("/proc/self/statm")
    if resource is None or not statm.is_file():
        yield
        return
    now = int(statm.read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = now + more if soft == resource.RLIM_INFINITY else min(now + more, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
