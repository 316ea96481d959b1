"""The child's side: reads jobs from its socket, does them within its limits, and sends the answers.

A frame, in either direction, is four bytes of length followed by JSON. The child imports only what its jobs need, so
that it starts quickly. It ends when its socket closes or when a job's time is up, so it never outlives its parent long.
"""

import json
import math
import os
import signal
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import BinaryIO

try:
    import resource
except ImportError:  # no such limits here
    resource = None

LENGTH = struct.Struct(">I")
LARGEST_FRAME = 256 * 2**20  # bytes
OPAQUE = "\0type"


class RefusedError(Exception):
    """The foreign text or file itself rejects this input."""


def serve() -> None:
    """Do jobs until the socket (standard input) closes.

    The first frame names the module of huarizo.sandbox whose JOBS to run, and how many bytes of memory they may use
    beyond its imports. A job that is a generator sends its items one by one.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    with socket.socket(fileno=os.dup(0)) as channel, channel.makefile("rb") as requests:
        start = json.loads(read_frame(requests) or b"{}")
        jobs: dict[str, Callable[..., object]] = import_module(f"huarizo.sandbox.{start['module']}").JOBS
        _limit_memory(start["memory"])
        _send(channel, {"done": True})
        while (data := read_frame(requests)) is not None:
            request = json.loads(data)
            with suppress(BrokenPipeError, ConnectionResetError):
                for answer in _answers(jobs[request["job"]], request["arguments"], request["seconds"]):
                    _send(channel, answer)


def read_frame(stream: BinaryIO) -> bytes | None:
    """The next frame's JSON; None at the end of the stream, even in the middle of a frame."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    data = stream.read(length)
    return data if len(data) == length else None


def frame(value: object) -> bytes:
    """A value as a frame. A value that JSON lacks becomes `{OPAQUE: type name}`.

    Raises:
        MemoryError: the frame is larger than LARGEST_FRAME.
    """
    data = json.dumps(value, separators=(",", ":"), default=_opaque).encode("ascii")
    if len(data) > LARGEST_FRAME:
        raise MemoryError
    return LENGTH.pack(len(data)) + data


def _opaque(value: object) -> dict[str, str]:
    return {OPAQUE: type(value).__name__}


def _send(channel: socket.socket, answer: Mapping[str, object]) -> None:
    try:
        data = frame(answer)
    except MemoryError:
        data = frame({"memory": True})
    channel.sendall(data)


def _answers(
    job: Callable[..., object], arguments: Mapping[str, object], seconds: float
) -> Iterator[dict[str, object]]:
    """The job's result, or why there is none. A foreign file may raise any exception, including panics from Rust."""
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
    """Let the kernel end this process after this many more seconds of CPU time."""
    if resource is not None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = math.ceil(used.ru_utime + used.ru_stime + seconds) + 1
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (limit if hard < 0 else min(limit, hard), hard))


def _limit_memory(more: int) -> None:
    """Allow `more` bytes beyond what is mapped now. Linux only: elsewhere only the time and file size limits apply."""
    statm = Path("/proc/self/statm")
    if resource is None or not statm.is_file():
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit = int(statm.read_text().split()[0]) * resource.getpagesize() + more
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))
