"""documents.parquet: which document each token of a split belongs to, a row a document in stream order."""

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

SCHEMA = pa.schema(
    [
        ("start", pa.int64()),  # index of its first token in the split
        ("length", pa.int32()),  # tokens kept, <s> and </s> among them
        ("id", pa.string()),
        ("url", pa.string()),
        ("file", pa.string()),  # as in the manifest
        ("row", pa.int64()),  # in that file, from 0
        ("text_sha256", pa.binary(32)),
    ]
)
ROW_GROUP = 1 << 16


@dataclass(frozen=True)
class Document:
    """One row of the index."""

    start: int
    length: int
    id: str
    url: str
    file: str
    row: int
    text_sha256: bytes


def index_name(split: str) -> str:
    return f"{split}/documents.parquet"


class ContentHash:
    """The SHA-256 of an index's content, fed in batches, whatever their borders.

    Over the columns in schema order: name, NUL, sha256(A), sha256(B), raw digests. Strings: A the byte lengths as
    little-endian uint32, B the bytes. Others: A the little-endian values, B empty. A parquet file's own bytes change
    with the library that writes them; this does not.
    """

    def __init__(self) -> None:
        self._pairs = [(hashlib.sha256(), hashlib.sha256()) for _ in SCHEMA]

    def update(self, batch: pa.RecordBatch) -> None:
        for column, (a, b) in zip(batch.columns, self._pairs, strict=True):
            if pa.types.is_string(column.type):
                a.update(pc.binary_length(column).to_numpy(zero_copy_only=False).astype("<u4").tobytes())
                b.update(_bytes(column, _offsets(column)))
            else:
                width = column.type.bit_width // 8
                data = memoryview(column.buffers()[1])
                a.update(data[column.offset * width : (column.offset + len(column)) * width])

    def hexdigest(self) -> str:
        total = hashlib.sha256()
        for field, (a, b) in zip(SCHEMA, self._pairs, strict=True):
            total.update(field.name.encode() + b"\0" + a.digest() + b.digest())
        return total.hexdigest()


def read_index(folder: Path, split: str, span: tuple[int, int] | None = None) -> Iterator[pa.RecordBatch]:
    """The index in batches of at most ROW_GROUP rows; of a `span` of tokens only the row groups that may own some.

    ValueError when the file cannot be read or has other columns.
    """
    path = folder / index_name(split)
    try:
        with pq.ParquetFile(path) as file:
            if file.schema_arrow != SCHEMA:
                raise ValueError(f"{path}: its columns are not those of an index")
            groups = range(file.num_row_groups) if span is None else _row_groups(file, *span)
            yield from file.iter_batches(batch_size=ROW_GROUP, row_groups=list(groups), use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None


def documents_between(folder: Path, split: str, start: int, stop: int) -> list[Document]:
    """The documents that own any of the tokens start ... stop-1 of a split, in order."""
    found: list[Document] = []
    for batch in read_index(folder, split, (start, stop)):
        starts = batch["start"].to_numpy()
        if not len(starts) or starts[0] >= stop:
            continue
        ends = starts + batch["length"].to_numpy()
        first, last = np.searchsorted(ends, start, side="right"), np.searchsorted(starts, stop, side="left")
        found += [Document(**row) for row in batch.slice(int(first), max(0, int(last - first))).to_pylist()]
    return found


def _row_groups(file: pq.ParquetFile, start: int, stop: int) -> range:
    """The row groups with the documents of tokens start ... stop-1: rows are in stream order, so a binary search."""
    firsts = [_first_start(file, group) for group in range(file.num_row_groups)]
    return range(max(0, bisect_right(firsts, start) - 1), bisect_left(firsts, stop))


def _first_start(file: pq.ParquetFile, group: int) -> int:
    """Where the first document of a row group starts: in the footer, unless a foreign writer left it out."""
    statistics = file.metadata.row_group(group).column(0).statistics
    if statistics is not None and statistics.has_min_max:
        return int(statistics.min)
    return int(file.read_row_group(group, columns=["start"])["start"][0].as_py())


def _offsets(column: pa.Array) -> tuple[int, int]:
    offsets = np.frombuffer(column.buffers()[1], dtype="<i4")
    return int(offsets[column.offset]), int(offsets[column.offset + len(column)])


def _bytes(column: pa.Array, span: tuple[int, int]) -> memoryview | bytes:
    data = column.buffers()[2]
    return memoryview(data)[span[0] : span[1]] if data is not None else b""
