"""Parts of a parquet file that lies elsewhere: its footer and the bytes of some row groups, read as if it were here."""

import io
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from prep.lines import READ_BYTES

TAIL = 8  # bytes at the end of a parquet file: the length of its footer, then a magic word
MAGIC = b"PAR1"


def footer_length(tail: bytes, where: str) -> int:
    """Bytes of the footer with its tail. ValueError when the last bytes of the file are not those of parquet."""
    if len(tail) != TAIL or tail[4:] != MAGIC:
        raise ValueError(f"{where}: not a readable parquet file (empty, cut off or damaged)")
    return int.from_bytes(tail[:4], "little") + TAIL


@lru_cache(maxsize=64)
def footer(path: Path) -> pq.FileMetaData:
    """The footer that lies alone in the file `path`. Parsed once: a large one takes longer than opening its file."""
    return pq.read_metadata(path)


def span_of(metadata: pq.FileMetaData, groups: tuple[int, int]) -> tuple[int, int]:
    """The bytes (first, one past the last) of the file that hold row groups `groups` (first, one past the last)."""
    starts, ends = [], []
    for group in range(*groups):
        for i in range(metadata.num_columns):
            column = metadata.row_group(group).column(i)
            dictionary = column.dictionary_page_offset
            start = column.data_page_offset if dictionary is None else min(dictionary, column.data_page_offset)
            starts.append(start)
            ends.append(start + column.total_compressed_size)
    return min(starts), max(ends)


def open_span(path: Path, metadata: pq.FileMetaData, groups: tuple[int, int], size: int) -> pq.ParquetFile:
    """Open a file of `size` bytes of which only the span of `groups` is here, in the file `path`."""
    first, _ = span_of(metadata, groups)
    return pq.ParquetFile(_Span(path, first, size), metadata=metadata, buffer_size=READ_BYTES, pre_buffer=False)


class _Span(io.RawIOBase):
    """The file `path` as bytes `first` ... of a file of `size` bytes."""

    def __init__(self, path: Path, first: int, size: int) -> None:
        self._file = path.open("rb", buffering=0)
        self._first, self._size, self._at = first, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        assert self._at >= self._first, "a read before the span"
        self._file.seek(self._at - self._first)
        n = self._file.readinto(buffer) or 0
        self._at += n
        return n

    def close(self) -> None:
        self._file.close()
        super().close()
