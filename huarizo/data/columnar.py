"""Parquet and Arrow files become records. A child process unfolds them, in bounded memory and time.

Only the columns that are looked at are read.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from huarizo.data.discovery import check_columns_differ, refusal
from huarizo.sandbox.child import OPAQUE
from huarizo.sandbox.worker import FailedError, TooCostlyError, Worker
from huarizo.wording import excerpt

MEMORY = 16 * 2**30  # bytes at most, with what is read of the rows
TIME = 60.0  # seconds, of a batch of rows


class Opaque(NamedTuple):
    """A value of a kind that no row has, such as a date; `type` is the name of its Python type."""

    type: str


def read_columnar(path: Path, wanted: Collection[str]) -> Iterator[tuple[int, object]]:
    """Row numbers from 1 and rows as dicts; columns that are not wanted are None, and what is no text, number, list or
    object is `Opaque`.

    Raises:
        DataError: it can't be read as what its name says, or not in the memory that there is.
    """
    import torch

    from huarizo.machine import available_memory

    most = min(MEMORY, available_memory(torch.device("cpu")))
    worker, file = Worker("columnar", most), str(path.absolute())
    try:
        names = worker.call("columns", TIME, path=file)
        check_columns_differ(path, names)
        chosen = [name for name in names if name in wanted]
        empty = dict.fromkeys(names)
        number = 0
        for batch in worker.stream("rows", TIME, most, path=file, wanted=chosen):
            for values in batch:
                number += 1
                yield number, empty | dict(zip(chosen, map(_opaque, values), strict=True))
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


def _opaque(value: Any) -> Any:
    """A value from the child, in which what JSON doesn't have stands as `{OPAQUE: its type}`."""
    if isinstance(value, list):
        return [_opaque(inner) for inner in value]
    if isinstance(value, dict):
        return Opaque(value[OPAQUE]) if OPAQUE in value else {name: _opaque(inner) for name, inner in value.items()}
    return value
