"""Parquet and Arrow files become records. Only the columns that are looked at are read, in batches, in bounded memory.

Arrow files are what `save_to_disk` of the `datasets` library leaves behind, as a stream or as a file with a footer.
Their buffers are validated before a value is taken out of them, because offsets in a damaged file lead anywhere.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huarizo.data.files import check_columns_differ, excerpt, refusal
from huarizo.data.limits import bounded_memory

MEMORY = 16 * 2**30  # bytes at most, with what is read of the rows
BATCH = 1000  # rows converted at a time


def read_columnar(path: Path, wanted: Collection[str]) -> Iterator[tuple[int, object]]:
    """Row numbers from 1 and rows as dicts; columns that are not wanted are None.

    Raises:
        DataError: it can't be read as what its name says, or not in the memory that there is.
    """
    import pyarrow as pa
    import torch

    from huarizo.machine import available_memory

    kind, opened = ("Arrow", _arrow) if path.suffix.lower() == ".arrow" else ("Parquet", _parquet)
    try:
        with bounded_memory(min(MEMORY, available_memory(torch.device("cpu")))), opened(path, wanted) as (names, rows):
            check_columns_differ(path, names)
            empty = dict.fromkeys(names)
            number = 0
            for batch in rows:
                columns = [column.to_pylist() for column in batch.columns]
                for values in zip(*columns, strict=True) if columns else [()] * batch.num_rows:
                    number += 1
                    yield number, empty | dict(zip(batch.schema.names, values, strict=True))
    except MemoryError:
        what = "takes more memory to unpack than there is"
        raise refusal(path, what, "Write it with smaller row groups, or check that this is a file of rows") from None
    except UnicodeDecodeError:
        raise refusal(path, "has a text column with bytes that are not UTF-8", "Decode it before writing it") from None
    except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError) as error:
        what = f"can't be read as {kind}: {excerpt(str(error), 120)}"
        raise refusal(path, what, "It may be cut off or damaged: download or write it again") from None


@contextmanager
def _parquet(path: Path, wanted: Collection[str]) -> Iterator[tuple[Sequence[str], Iterator[Any]]]:
    """All column names, and batches of the wanted ones; a batch of one row without columns where there are none."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        chosen = [name for name in names if name in wanted]
        if chosen or not file.metadata.num_rows:
            yield names, file.iter_batches(batch_size=BATCH, columns=chosen)
        else:
            yield names, iter([_one_row()])


@contextmanager
def _arrow(path: Path, wanted: Collection[str]) -> Iterator[tuple[Sequence[str], Iterator[Any]]]:
    """As `_parquet`."""
    import pyarrow as pa

    with pa.OSFile(str(path), "rb") as file:
        has_footer = file.read(6) == b"ARROW1"
        read = pa.ipc.open_file if has_footer else pa.ipc.open_stream
        file.seek(0)
        names = read(file).schema.names
        chosen = [place for place, name in enumerate(names) if name in wanted]
        file.seek(0)
        reader = read(file, options=pa.ipc.IpcReadOptions(included_fields=chosen))
        yield names, _valid(reader, has_footer) if chosen else iter([_one_row()])


def _valid(reader: Any, has_footer: bool) -> Iterator[Any]:
    batches = (reader.get_batch(place) for place in range(reader.num_record_batches)) if has_footer else reader
    for batch in batches:
        batch.validate(full=True)
        for start in range(0, batch.num_rows, BATCH):
            yield batch.slice(start, BATCH)


def _one_row() -> Any:
    import pyarrow as pa

    return pa.RecordBatch.from_struct_array(pa.array([{}], pa.struct([])))
