"""The parent's side: a child process that does jobs on foreign text, and is killed if one takes too much.

A worker can be used from any thread, one job at a time. The child starts with the first job and is kept for later ones,
because a run renders tens of thousands of rows. Anything that ends a job early, such as Ctrl-C, ends the child as well.
"""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huarizo.sandbox.child import RefusedError, frame, read_frame

STARTING = 60.0  # seconds
MEMORY = "more memory than it may"
CODE = "import sys; sys.path[:] = sys.argv[1:]; from huarizo.sandbox.child import serve; serve()"


class TooCostlyError(Exception):
    """A job takes more time or memory than allowed; the message says which."""


class FailedError(Exception):
    """A job raises an exception; the message is that of the exception."""


__all__ = ["FailedError", "RefusedError", "TooCostlyError", "Worker"]


class Worker:
    """A child process for the JOBS of `huarizo.sandbox.{module}`, limited to `memory` bytes beyond its imports."""

    def __init__(self, module: str, memory: int) -> None:
        self.module, self.memory = module, memory
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0  # id of the process that started the child; a fork of it must start its own

    @property
    def pid(self) -> int | None:
        """The child's process id; None while no child runs."""
        child = self._child
        return child.pid if child is not None and self._owner == os.getpid() and child.poll() is None else None

    def call(self, job: str, seconds: float, **arguments: object) -> Any:
        """The job's result (a JSON value), within this many seconds.

        Raises:
            TooCostlyError: it takes longer, or more memory.
            RefusedError: the text or file itself rejects this input.
            FailedError: the job raises any other exception.
        """
        (result,) = self._answers(job, seconds, arguments)
        return result

    def stream(self, job: str, seconds: float, most: int, **arguments: object) -> Iterator[Any]:
        """The items that a job yields, within `seconds` for each and `most` bytes in all. Raises as `call` does."""
        yield from self._answers(job, seconds, arguments, most)

    def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is not None and self._owner == os.getpid():
            self._stream.close()
            self._channel.close()
            child.kill()
            child.wait()

    def _answers(
        self, job: str, seconds: float, arguments: dict[str, object], most: int | None = None
    ) -> Iterator[Any]:
        request = frame({"job": job, "seconds": seconds, "arguments": arguments})
        with self._lock:
            is_whole = False
            try:
                if self.pid is None:
                    self.close()
                    self._start_or_fail()
                self._received = 0
                self._channel.settimeout(seconds)
                self._channel.sendall(request)
                while True:
                    kind, value = self._answer()
                    if most is not None and self._received > most:
                        kind = "memory"
                    if kind == "item":
                        yield value
                        continue
                    is_whole = kind != "memory"  # after running out of memory, the next job gets a new child
                    break
            except TimeoutError:
                raise TooCostlyError(f"more than {seconds:g} seconds") from None
            except ConnectionError:
                raise self._end(seconds) from None
            finally:
                if not is_whole:
                    self.close()
        if kind == "memory":
            raise TooCostlyError(MEMORY)
        if kind == "refused":
            raise RefusedError(value)
        if kind == "failed":
            raise FailedError(value)
        if most is None:
            yield value

    def _start_or_fail(self) -> None:
        try:
            self._start()
        except (TimeoutError, ConnectionError) as error:
            why = f"not within {STARTING:g} seconds" if isinstance(error, TimeoutError) else "it ends at once"
            raise FailedError(f"the process that reads it does not start ({why})") from None

    def _start(self) -> None:
        self._channel, theirs = socket.socketpair()
        self._stream = self._channel.makefile("rb")
        self._owner = os.getpid()
        atexit.unregister(self.close)
        atexit.register(self.close)
        root = str(Path(__file__).parents[2])
        command = [sys.executable, "-I", "-S", "-c", CODE, root, *sys.path]
        with theirs:
            self._child = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,  # so that Ctrl-C reaches the parent alone
            )
        self._received = 0  # bytes, of the job's answers
        self._channel.settimeout(STARTING)
        self._channel.sendall(frame({"module": self.module, "memory": self.memory}))
        self._answer()

    def _answer(self) -> tuple[str, Any]:
        """The next answer's kind and value. Raises TimeoutError, or ConnectionError if the child has ended."""
        answer = read_frame(self._stream)
        if answer is None:
            raise ConnectionError
        self._received += len(answer)
        (pair,) = json.loads(answer).items()
        return pair

    def _end(self, seconds: float) -> Exception:
        """The exception for a child that has ended, by the signal that ended it."""
        child = self._child
        number = -child.wait() if child is not None else 0
        if number == signal.SIGXCPU:
            return TooCostlyError(f"more than {seconds:g} seconds")
        if number in (signal.SIGABRT, signal.SIGKILL):  # a library, or the system, out of memory
            return TooCostlyError(MEMORY)
        return FailedError(f"it crashes the process that reads it (exit {-number})")
