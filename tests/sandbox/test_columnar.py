"""Damaged Parquet and Arrow files, read in one child: each gives rows or an exception, and the child goes on."""

import io
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from huarizo.sandbox.worker import FailedError, TooCostlyError, Worker

MEMORY = 8 * 2**30  # bytes; Arrow reserves more addresses than it uses
TABLE = pa.table({"messages": [[{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]] * 3})


def parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(TABLE, file)
    return file.getvalue()


def arrow() -> bytes:
    file = io.BytesIO()
    with pa.ipc.new_stream(file, TABLE.schema) as stream:
        stream.write_table(TABLE)
    return file.getvalue()


CONTENTS = {".parquet": parquet(), ".arrow": arrow()}


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    made = Worker("columnar", MEMORY)
    yield made
    made.close()


def rows_of(worker: Worker, content: bytes, suffix: str) -> list[object]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"a{suffix}")
        path.write_bytes(content)
        names = worker.call("columns", 10, path=str(path))
        batches = worker.stream("rows", 10, MEMORY, path=str(path), wanted=names)
        return [row for batch in batches for row in batch]


@pytest.mark.parametrize("suffix", CONTENTS)
def test_a_whole_file_gives_its_rows(worker: Worker, suffix: str) -> None:
    assert rows_of(worker, CONTENTS[suffix], suffix) == [list(row.values()) for row in TABLE.to_pylist()]


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from(sorted(CONTENTS)))
def test_a_damaged_file_gives_rows_or_an_exception(worker: Worker, data: st.DataObject, suffix: str) -> None:
    content = bytearray(CONTENTS[suffix])
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    try:
        rows_of(worker, bytes(content), suffix)
    except (FailedError, TooCostlyError) as error:
        assert str(error)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([b"", b"PAR1", b"ARROW1"]), st.binary(max_size=200), st.sampled_from(sorted(CONTENTS)))
def test_any_bytes_give_rows_or_an_exception(worker: Worker, beginning: bytes, data: bytes, suffix: str) -> None:
    try:
        rows_of(worker, beginning + data, suffix)
    except (FailedError, TooCostlyError) as error:
        assert str(error)
