"""Reads Parquet and Arrow files into records. A child process expands them, with limits on memory and time.

Only the columns that will be used are read.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from huarizo.data.discovery import check_columns_differ, refusal
from huarizo.sandbox.child import OPAQUE
from huarizo.sandbox.worker import FailedError, TooCostlyError, Worker
from huarizo.wording import excerpt

MEMORY = 16 * 2**30  # bytes at most, for the child and for the rows that it sends
TIME = 60.0  # seconds at most, for one batch of rows


class Opaque(NamedTuple):
    """A value that is not valid in any row, such as a date; `type` is the name of its Python type."""

    type: str


def read_columnar(path: Path, wanted: Collection[str]) -> Iterator[tuple[int, object]]:
    """Row numbers (from 1) and rows as dicts. Columns that are not wanted are None.

    A value that is not a text, number, list or object becomes `Opaque`.

    Raises:
        DataError: the file can't be read as what its name says, or not within the available memory.
    """
    import torch

    from huarizo.machine import available_memory

    limit = min(MEMORY, available_memory(torch.device("cpu")))
    worker, file = Worker("columnar", limit), str(path.absolute())
    try:
        names = worker.call("columns", TIME, path=file)
        check_columns_differ(path, names)
        chosen = [name for name in names if name in wanted]
        empty = dict.fromkeys(names)
        number = 0
        for batch in worker.stream("rows", TIME, limit, path=file, wanted=chosen):
            for values in batch:
                number += 1
                yield number, empty | dict(zip(chosen, map(_with_opaque, values), strict=True))
    except TooCostlyError as error:
        what = f"takes {error} to unpack"
        raise refusal(path, what, "Write it with smaller row groups, or check that this is a file of rows") from None
    except FailedError as error:
        if str(error).startswith("UnicodeDecodeError"):
            what, remedy = "has a text column with bytes that are not UTF-8", "Decode it before writing it"
        else:
            kind = "Arrow" if path.suffix.lower() == ".arrow" else "Parquet"
            what = f"can't be read as {kind}: {excerpt(str(error).partition(': ')[2] or str(error), 120)}"
            remedy = "It may be cut off or damaged: download or write it again"
        raise refusal(path, what, remedy) from None
    finally:
        worker.close()


def _with_opaque(value: object) -> object:
    """A value from the child, with each `{OPAQUE: type name}` replaced by an `Opaque`."""
    if isinstance(value, list):
        return [_with_opaque(inner) for inner in value]
    if isinstance(value, dict):
        return (
            Opaque(value[OPAQUE]) if OPAQUE in value else {name: _with_opaque(inner) for name, inner in value.items()}
        )
    return value
