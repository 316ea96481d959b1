"""The child's side: reads jobs from its socket, does them within its limits, and answers.

Frames in both directions are four bytes of length and JSON. The child imports what its jobs need and nothing else, so
that it starts quickly; it ends with its socket, and at the latest when a job's time is up, also without a parent.
"""

import json
import math
import os
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

try:
    import resource
except ImportError:  # no such limits here
    resource = None

LENGTH = struct.Struct(">I")
LARGEST_FRAME = 256 * 2**20  # bytes
OPAQUE = "\0type"


class RefusedError(Exception):
    """Foreign text or a file says itself that it refuses this input."""


def serve() -> None:
    """Do jobs until the socket, which is standard input, ends.

    The first frame names the module of huarizo.sandbox whose JOBS they are, and how many bytes of memory they may take
    beyond its imports. A job that is a generator sends its items one by one.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    with socket.socket(fileno=os.dup(0)) as channel, channel.makefile("rb") as requests:
        start = json.loads(read_frame(requests) or b"{}")
        jobs: dict[str, Callable[..., Any]] = import_module(f"huarizo.sandbox.{start['module']}").JOBS
        _limit_memory(start["memory"])
        _send(channel, {"done": True})
        while (data := read_frame(requests)) is not None:
            request = json.loads(data)
            with suppress(BrokenPipeError, ConnectionResetError):
                for answer in _answers(jobs[request["job"]], request["arguments"], request["seconds"]):
                    _send(channel, answer)


def read_frame(stream: BinaryIO) -> bytes | None:
    """The next frame's JSON; None at the end of the stream, in the middle of a frame too."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    data = stream.read(length)
    return data if len(data) == length else None


def frame(value: Any) -> bytes:
    """A value as a frame; what JSON doesn't have becomes `{OPAQUE: type}`. Raises MemoryError: it is too large."""
    data = json.dumps(value, separators=(",", ":"), default=_opaque).encode("ascii")
    if len(data) > LARGEST_FRAME:
        raise MemoryError
    return LENGTH.pack(len(data)) + data


def _opaque(value: Any) -> dict[str, str]:
    return {OPAQUE: type(value).__name__}


def _send(channel: socket.socket, answer: dict[str, Any]) -> None:
    try:
        data = frame(answer)
    except MemoryError:
        data = frame({"memory": True})
    channel.sendall(data)


def _answers(job: Callable[..., Any], arguments: dict[str, Any], seconds: float) -> Iterator[dict[str, Any]]:
    """What a job gives, or why it gives nothing. A foreign file may set off any exception, those of Rust included."""
    try:
        _limit_time(seconds)
        result = job(**arguments)
        if isinstance(result, Iterator):
            for item in result:
                yield {"item": item}
                _limit_time(seconds)
            result = None
        yield {"done": result}
    except MemoryError:
        yield {"memory": True}
    except RefusedError as error:
        yield {"refused": str(error)}
    except RecursionError:
        yield {"failed": "it is nested too deeply"}
    except BaseException as error:
        yield {"failed": f"{type(error).__name__}: {error}"[:1000]}


def _limit_time(seconds: float) -> None:
    """The kernel ends this process when it has computed so long from now on, whatever it computes."""
    if resource is not None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = math.ceil(used.ru_utime + used.ru_stime + seconds) + 1
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (limit if hard < 0 else min(limit, hard), hard))


def _limit_memory(more: int) -> None:
    """Linux only; elsewhere the bounds on time and on what a file may hold are all there is."""
    statm = Path("/proc/self/statm")
    if resource is None or not statm.is_file():
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit = int(statm.read_text().split()[0]) * resource.getpagesize() + more
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))
