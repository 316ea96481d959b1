"""The rows of a Parquet file, batch by batch: a few kilobytes can unfold into terabytes, but only here."""

from collections.abc import Collection, Iterator
from typing import Any

import pyarrow.parquet as pq

BATCH = 1000  # rows at most
BATCH_BYTES = 16 * 2**20  # of a batch, by what the file says of its rows


def columns(path: str) -> tuple[list[str], int]:
    """Names of the columns, and how many rows there are."""
    with pq.ParquetFile(path) as file:
        return file.schema_arrow.names, file.metadata.num_rows


def rows(path: str, wanted: Collection[str]) -> Iterator[list[list[Any]]]:
    """Batches of rows, each the values of the wanted columns in the file's order."""
    with pq.ParquetFile(path) as file:
        chosen = [name for name in file.schema_arrow.names if name in wanted]
        groups = (file.metadata.row_group(number) for number in range(file.num_row_groups))
        row = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
        size = min(BATCH, max(1, BATCH_BYTES // max(row, 1)))
        for batch in file.iter_batches(batch_size=size, columns=chosen, use_threads=False):
            yield [list(values) for values in zip(*(column.to_pylist() for column in batch.columns), strict=True)]


JOBS = {"columns": columns, "rows": rows}
