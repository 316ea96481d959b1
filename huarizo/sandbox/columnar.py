"""Reads the rows of a Parquet or Arrow file in batches, in the child, because kilobytes can expand into terabytes.

Arrow files are those that `save_to_disk` of the `datasets` library writes, as a stream or as a file with a footer.
Their buffers are validated before any value is read, because offsets in a damaged file can point anywhere.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

BATCH = 1000  # rows at most
BATCH_BYTES = 16 * 2**20  # of a batch at most, estimated from the sizes that the file declares


def columns(path: str) -> list[str]:
    """The names of the columns, in the file's order."""
    if _is_arrow(path):
        with pa.OSFile(path, "rb") as file:
            return _arrow_reader(file)[0].schema.names
    with pq.ParquetFile(path) as file:
        return file.schema_arrow.names


def rows(path: str, wanted: Collection[str]) -> Iterator[list[list[object]]]:
    """Batches of rows. A row is the values of the wanted columns, in the file's order.

    A file with rows but none of the wanted columns gives one empty row.
    """
    for batch in _arrow_batches(path, wanted) if _is_arrow(path) else _parquet_batches(path, wanted):
        if not batch.num_columns:
            if batch.num_rows:
                yield [[]]
                return
            continue
        yield [list(values) for values in zip(*(column.to_pylist() for column in batch.columns), strict=True)]


def _is_arrow(path: str) -> bool:
    return Path(path).suffix.lower() == ".arrow"


def _parquet_batches(path: str, wanted: Collection[str]) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path) as file:
        chosen = [name for name in file.schema_arrow.names if name in wanted]
        groups = (file.metadata.row_group(number) for number in range(file.num_row_groups))
        row = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
        size = min(BATCH, max(1, BATCH_BYTES // max(row, 1)))
        yield from file.iter_batches(batch_size=size, columns=chosen, use_threads=False)


def _arrow_reader(file: pa.OSFile, places: list[int] | None = None) -> tuple[Any, bool]:  # pyarrow is untyped
    """A reader of the columns at these places (all by default), and whether the file has a footer."""
    file.seek(0)
    has_footer = file.read(6) == b"ARROW1"
    file.seek(0)
    read = pa.ipc.open_file if has_footer else pa.ipc.open_stream
    return read(file, options=pa.ipc.IpcReadOptions(included_fields=places)), has_footer


def _arrow_batches(path: str, wanted: Collection[str]) -> Iterator[pa.RecordBatch]:
    with pa.OSFile(path, "rb") as file:
        names = _arrow_reader(file)[0].schema.names
        places = [place for place, name in enumerate(names) if name in wanted]
        reader, has_footer = _arrow_reader(file, places or None)
        numbers = range(reader.num_record_batches) if has_footer else ()
        for batch in map(reader.get_batch, numbers) if has_footer else reader:
            batch.validate(full=True)
            batch = batch if places else batch.select([])
            for start in range(0, batch.num_rows, BATCH):
                yield batch.slice(start, BATCH)


JOBS = {"columns": columns, "rows": rows}
