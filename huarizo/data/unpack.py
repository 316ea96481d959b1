"""Streams the bytes of a file, decompressed if its name ends in `.gz` or `.zst`.

A few compressed bytes can expand into terabytes, so only what is asked for is held, and reading stops when the output
is out of proportion to the file.
"""

import io
from pathlib import Path
from typing import IO, Literal

from huarizo.data.discovery import errors_named, refusal
from huarizo.sandbox.reading import open_file
from huarizo.wording import excerpt

CODECS: dict[str, Literal["gzip", "zstd"]] = {".gz": "gzip", ".zst": "zstd"}
UNPACKED = 2**30  # bytes that any file may unpack to
RATIO = 200  # a larger file may unpack to this many times its size; text rarely exceeds 20


def is_packed(path: Path) -> bool:
    return path.suffix.lower() in CODECS


def opened(path: Path) -> IO[bytes]:
    """The file's bytes as a stream, decompressed.

    Raises:
        DataError: there is no such file; or, while reading, it can't be unpacked or unpacks to too much.
    """
    with errors_named(path):
        return io.BufferedReader(_Unpacked(path), 2**16) if is_packed(path) else open_file(path)


class _Unpacked(io.RawIOBase):
    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self.path, self.codec = path, CODECS[path.suffix.lower()]
        self.bytes_left = max(UNPACKED, RATIO * path.stat().st_size)
        self.stream = pa.CompressedInputStream(pa.OSFile(str(path), "rb"), self.codec)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            data = self.stream.read(len(buffer))
        except (OSError, ValueError) as error:
            what = f"can't be unpacked as {self.codec}: {excerpt(str(error), 120)}"
            raise refusal(self.path, what, "It may be cut off or damaged: download or pack it again") from None
        self.bytes_left -= len(data)
        if self.bytes_left < 0:
            what = f"unpacks to more than {RATIO} times its size"
            raise refusal(self.path, what, "Unpack it yourself, and check that it is a file of rows")
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.stream.close()
        super().close()
