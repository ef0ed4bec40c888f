"""Units as rows of text, whatever kind of file they lie in."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from prep.lines import Parsed, parse_json, parse_text, plain_lines, zst_lines
from prep.sources import UNIT_LINES, Readable, Unit, kind_of

BATCH_LINES = 256  # divides UNIT_LINES, so that no batch spans two units
BATCH_BYTES = 8 << 20


@dataclass(frozen=True)
class Rows:
    """Documents of consecutive rows: `text`, `id`, `url` strings (D,), `row` (D,) int64.

    `empty` are the rows without text, which are no documents; `stop` is the row after the last one of either.
    """

    text: pa.Array
    id: pa.Array
    url: pa.Array
    row: npt.NDArray[np.int64]
    empty: npt.NDArray[np.int64]
    stop: int

    def split(self, row: int) -> "tuple[Rows, Rows | None]":
        """What stands before `row` of the file, and the rest if there is one."""
        if row >= self.stop:
            return self, None
        n, e = (int(np.searchsorted(rows, row)) for rows in (self.row, self.empty))
        before = Rows(self.text[:n], self.id[:n], self.url[:n], self.row[:n], self.empty[:e], row)
        return before, Rows(self.text[n:], self.id[n:], self.url[n:], self.row[n:], self.empty[e:], self.stop)


@dataclass(frozen=True)
class Piece:
    """What one reading gave: its rows, the row to go on at, and whether a .zst file ended there."""

    rows: list[Rows]
    next_row: int
    ended: bool


class RowReader:
    """Reads units, from any row of them on, and goes on without seeking where the last reading stopped.

    That matters where a position can only be reached through all rows before it: .zst text and very large row groups.
    """

    def __init__(self, source: Readable) -> None:
        self._source = source
        self._key: object = None
        self._next = 0
        self._batches: Iterator[Rows] = iter(())
        self._rest: Rows | None = None  # of a batch that the last reading needed in part

    def read(self, unit: Unit, row: int, stop: int, limit: int) -> Piece:
        """Rows `row` ... `stop`-1 of `unit`; fewer once they hold `limit` bytes of text, or where a .zst file ends."""
        key = unit.file if unit.rows is None else unit
        if key != self._key or row < self._next:
            self._next = 0 if unit.rows is None else unit.row
            self._batches = self._open(unit)
            self._rest = None
        self._key = None  # whoever fails below starts afresh
        found: list[Rows] = []
        size, ended = 0, False
        while self._next < stop and not (found and size >= limit):
            batch = self._rest or next(self._batches, None)
            if batch is None:
                ended = True
                break
            batch, self._rest = batch.split(stop if self._next >= row else row)
            if self._next >= row:
                found.append(batch)
                size += batch.text.nbytes
            self._next = batch.stop
        self._key = key
        assert not ended or unit.rows is None, "a unit shorter than planned"
        return Piece(found, self._next, ended)

    def _open(self, unit: Unit) -> Iterator[Rows]:
        kind = kind_of(unit.file)
        if kind == ".parquet":
            return _parquet_batches(self._source, unit)
        path = self._source.path(unit.file)
        if kind == ".jsonl.zst":
            return _line_batches(zst_lines(path), path, unit.file, 0)
        assert unit.offset is not None
        return _line_batches(itertools.islice(plain_lines(path, unit.offset), unit.rows), path, unit.file, unit.row)


def _parquet_batches(source: Readable, unit: Unit) -> Iterator[Rows]:
    assert unit.groups is not None
    row, where = unit.row, source.where(unit.file)
    with source.parquet(unit) as file:
        columns = [name for name in ("text", "id", "url") if name in file.schema_arrow.names]
        groups = range(*unit.groups)
        unpacked = sum(file.metadata.row_group(g).total_byte_size for g in groups)
        rows = sum(file.metadata.row_group(g).num_rows for g in groups)
        size = max(1, min(UNIT_LINES, rows * BATCH_BYTES // max(1, unpacked)))
        try:
            for batch in file.iter_batches(size, row_groups=groups, columns=columns, use_threads=False):
                yield _parquet_rows(batch, where, unit.file, row)
                row += len(batch)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{where}: damaged near row {row}: {error}") from None


def _parquet_rows(batch: pa.RecordBatch, where: str, name: str, first: int) -> Rows:
    text = _utf8(batch["text"], where, "text", first)
    numbers = np.arange(first, first + len(batch), dtype=np.int64)
    full = pc.fill_null(pc.greater(pc.binary_length(text), 0), False)
    default_ids = pa.array([f"{name}#{row}" for row in numbers]) if _lacks(batch, "id") else None
    ids = _column(batch, "id", where, first, default_ids)
    urls = _column(batch, "url", where, first, "")
    if pc.all(full).as_py():
        return Rows(text, ids, urls, numbers, np.empty(0, np.int64), first + len(batch))
    keep = full.to_numpy(zero_copy_only=False)
    stop = first + len(batch)
    return Rows(text.filter(full), ids.filter(full), urls.filter(full), numbers[keep], numbers[~keep], stop)


def _lacks(batch: pa.RecordBatch, column: str) -> bool:
    return column not in batch.schema.names or batch[column].null_count > 0


def _column(batch: pa.RecordBatch, name: str, where: str, first: int, default: pa.Array | str | None) -> pa.Array:
    """A column as strings, with `default` where the file has none."""
    if name not in batch.schema.names:
        return default if isinstance(default, pa.Array) else pa.array([default] * len(batch), pa.string())
    try:
        values = _utf8(batch[name].cast(pa.string()), where, name, first)
    except pa.ArrowException:
        raise ValueError(f"{where}: its column {name!r} holds {batch[name].type}, not strings") from None
    return values if default is None else pc.coalesce(values, default)


def _utf8(column: pa.Array, where: str, name: str, first: int) -> pa.Array:
    """The column as a string array that is valid UTF-8. ValueError names the row that is not."""
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        column = column.cast(pa.large_string())
    try:
        column.validate(full=True)
    except pa.ArrowException as error:
        for i, raw in enumerate(column.cast(pa.large_binary()).to_pylist()):
            try:
                (raw or b"").decode()
            except UnicodeDecodeError as bad:
                raise ValueError(f"{where}: row {first + i}: {name} is not valid UTF-8: {bad.reason}") from None
        raise ValueError(f"{where}: damaged near row {first}: {error}") from None
    return column


def _line_batches(lines: Iterable[bytes], path: Path, name: str, row: int) -> Iterator[Rows]:
    parse = parse_text if kind_of(name) == ".txt" else parse_json
    pending: list[bytes] = []
    size = 0
    for line in lines:
        pending.append(line)
        size += len(line)
        # A border of a unit is a border of batches; long lines make shorter batches.
        if (row + len(pending)) % BATCH_LINES == 0 or size >= BATCH_BYTES:
            yield _line_rows(pending, parse, path, name, row)
            row, pending, size = row + len(pending), [], 0
    if pending:
        yield _line_rows(pending, parse, path, name, row)


def _line_rows(lines: list[bytes], parse: Callable[[bytes], Parsed], path: Path, name: str, first: int) -> Rows:
    texts: list[str] = []
    ids: list[str] = []
    urls: list[str] = []
    rows: list[int] = []
    empty: list[int] = []
    for row, line in enumerate(lines, first):
        try:
            text, name_, url = parse(line)
            if text:
                text.encode()  # JSON can spell a lone surrogate, which no UTF-8 has
        except (UnicodeDecodeError, UnicodeEncodeError) as error:
            raise ValueError(f"{path}: row {row}: not valid UTF-8: {error.reason}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: row {row}: {error}") from None
        if text:
            texts.append(text)
            ids.append(f"{name}#{row}" if name_ is None else name_)
            urls.append(url)
            rows.append(row)
        else:
            empty.append(row)
    text, id_, url = (pa.array(values, pa.string()) for values in (texts, ids, urls))
    return Rows(text, id_, url, np.array(rows, np.int64), np.array(empty, np.int64), first + len(lines))
