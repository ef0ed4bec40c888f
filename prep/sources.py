"""Files as rows of text: .parquet, .jsonl, .jsonl.zst and .txt (a line is a document), on this disk or on the Hub.

`open_source` and `tokenizer_file` are the only places that tell the two apart by name, and import the Hub's client.
"""

import glob
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prep.lines import READ_BYTES, chunks_of
from shared.durable import sha256_file
from shared.manifest import SourceFile
from shared.progress import Progress
from shared.stop import Stop

if TYPE_CHECKING:
    from prep.hub import HubSource

HUB = "hf://"
KINDS = (".parquet", ".jsonl", ".jsonl.zst", ".txt")
UNIT_LINES = 4096


@dataclass(frozen=True)
class Unit:
    """What is read in one piece of work: consecutive row groups of a parquet file, or lines of a text file.

    `row` is its first row in the file. `rows` is None for .zst, whose length shows only when it ends. `groups` are the
    row groups (first, one past the last) of parquet, `unpacked` their size in memory, all columns; `offset` the first
    line's byte in an unpacked text file.
    """

    file: str
    row: int
    rows: int | None
    groups: tuple[int, int] | None = None
    unpacked: int = 0
    offset: int | None = None


@dataclass(frozen=True)
class Pin:
    """What a source on the Hub was found to be, once: its commit and its files."""

    revision: str
    files: list[SourceFile]


class Readable(Protocol):
    """What a worker needs of a source: its files as they lie on this disk."""

    @property
    def folder(self) -> Path: ...  # in which it reads
    def path(self, name: str) -> Path: ...  # the whole file
    def where(self, name: str) -> str: ...  # what messages call it
    def stamp(self, name: str) -> int | None: ...  # differs once the file has changed; None when it is gone
    def parquet(self, unit: Unit) -> pq.ParquetFile: ...  # holds at least the row groups of `unit`


@dataclass(frozen=True)
class LocalSource:
    """Files under `root`; `names` are relative to it, sorted by their bytes."""

    root: Path
    names: list[str]
    repository = config = revision = None  # those of a source on the Hub

    @property
    def folder(self) -> Path:
        return self.root

    def path(self, name: str) -> Path:
        return self.root / name

    def where(self, name: str) -> str:
        return str(self.path(name))

    def stamp(self, name: str) -> int | None:
        path = self.path(name)
        return path.stat().st_mtime_ns if path.exists() else None

    def file_size(self, name: str) -> int:
        return self.path(name).stat().st_size

    def identify(self, name: str) -> SourceFile:
        path = self.path(name)
        return SourceFile(name, path.stat().st_size, sha256_file(path))

    def metadata(self, name: str) -> pq.FileMetaData:
        with open_parquet(self.path(name)) as file:
            return file.metadata

    def parquet(self, unit: Unit) -> pq.ParquetFile:
        return open_parquet(self.path(unit.file))

    def fetch(self, unit: Unit) -> None:
        """Nothing to do: it is here."""

    def size(self, unit: Unit) -> int:
        """Bytes that `fetch` will bring."""
        return 0

    def fetching(self) -> str:
        """How what `fetch` brings just now comes: nothing does."""
        return ""

    def release(self, unit: Unit) -> None:
        """Nothing to do: it stays here."""

    def close(self) -> None:
        """Nothing to do."""


def open_source(
    spec: str, *, pin: Pin | None = None, stop: Stop | None = None, progress: Progress | None = None
) -> "LocalSource | HubSource":
    """The files that SRC names: one file, a directory (with its subdirectories), a glob, or a dataset on the Hub.

    Of the Hub only: `pin` is what an earlier start found; waiting for the network ends at `stop`, `progress` shows it.
    """
    if spec.startswith(HUB):
        from prep.hub import open_hub

        return open_hub(spec, pin, Stop() if stop is None else stop, progress or Progress())
    path = Path(spec).expanduser()
    if path.is_file():
        if kind_of(path.name) is None:
            raise ValueError(f"{spec}: expected a file of {', '.join(KINDS)}")
        return LocalSource(path.parent.resolve(), [path.name])
    if path.is_dir():
        root, found = path, sorted(path.rglob("*"))
    elif any(glob.has_magic(part) for part in path.parts):
        root = _last_plain_folder(path)
        found = [Path(match) for match in glob.iglob(str(path), recursive=True)]  # noqa: PTH207 (absolute)
    else:
        raise ValueError(f"{spec}: no such file or directory")
    names = [str(file.relative_to(root)) for file in found if file.is_file() and kind_of(file.name)]
    if not names:
        raise ValueError(f"{spec}: no files of {', '.join(KINDS)} there")
    return LocalSource(root.resolve(), sorted(names, key=lambda name: name.encode()))


def tokenizer_file(spec: str, *, stop: Stop | None = None, progress: Progress | None = None) -> Path:
    """The .model file that TOK names, on this disk."""
    if not spec.startswith(HUB):
        return Path(spec).expanduser()
    from prep.hub import fetch_tokenizer

    return fetch_tokenizer(spec, Stop() if stop is None else stop, progress or Progress())


def kind_of(name: str) -> str | None:
    return next((kind for kind in KINDS if name.endswith(kind)), None)


def _last_plain_folder(path: Path) -> Path:
    parts = path.parent.parts
    plain = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return Path(*parts[:plain]) if plain else Path()


def all_units(source: "LocalSource | HubSource", unit_bytes: int, names: list[str] | None = None) -> list[Unit]:
    """The units of all files, or of the `names` given, in the order of their names."""
    chosen = source.names if names is None else names
    with ThreadPoolExecutor(8) as pool:  # footers on the Hub are far away, and counting lines takes time
        return [unit for units in pool.map(lambda name: units_of(source, name, unit_bytes), chosen) for unit in units]


def units_of(source: "LocalSource | HubSource", name: str, unit_bytes: int) -> list[Unit]:
    """The units of a file in order; of .zst text only the first, since its length is not known yet."""
    kind = kind_of(name)
    if kind == ".parquet":
        return _parquet_units(source, name, unit_bytes)
    if kind == ".jsonl.zst":
        return [Unit(name, 0, None)]
    return _line_units(source.path(name), name)


def unit_after(unit: Unit) -> Unit:
    """The unit of .zst text that follows."""
    assert unit.rows is None
    return Unit(unit.file, unit.row + UNIT_LINES, None)


def _parquet_units(source: "LocalSource | HubSource", name: str, unit_bytes: int) -> list[Unit]:
    metadata = source.metadata(name)
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    packed = [sum(g.column(c).total_compressed_size for c in range(metadata.num_columns)) for g in groups]
    return group_units(name, packed, [g.num_rows for g in groups], [g.total_byte_size for g in groups], unit_bytes)


def group_units(name: str, packed: list[int], rows: list[int], unpacked: list[int], unit_bytes: int) -> list[Unit]:
    """Consecutive row groups, greedily, while their `packed` bytes stay within `unit_bytes`; at least one each."""
    units: list[Unit] = []
    first = row = 0
    while first < len(packed):
        stop, size = first + 1, packed[first]
        while stop < len(packed) and size + packed[stop] <= unit_bytes:
            size += packed[stop]
            stop += 1
        count = sum(rows[first:stop])
        units.append(Unit(name, row, count, groups=(first, stop), unpacked=sum(unpacked[first:stop])))
        row += count
        first = stop
    return units


def _line_units(path: Path, name: str) -> list[Unit]:
    units: list[Unit] = []
    lines = start = at = 0  # start: where the line begins that we are in
    unit_offset = 0
    with chunks_of(path) as chunks:
        for chunk in chunks:
            newlines = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == 10)
            first_border = -(lines % UNIT_LINES) + UNIT_LINES - 1  # of the newlines here, the first that ends a unit
            for border in newlines[first_border::UNIT_LINES].tolist():
                units.append(Unit(name, len(units) * UNIT_LINES, UNIT_LINES, offset=unit_offset))
                unit_offset = at + border + 1
            lines += len(newlines)
            if len(newlines):
                start = at + int(newlines[-1]) + 1
            at += len(chunk)
    lines += start < at  # a last line without a line break
    if lines % UNIT_LINES:
        units.append(Unit(name, len(units) * UNIT_LINES, lines % UNIT_LINES, offset=unit_offset))
    return units


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a parquet file and check that it has text. ValueError names what is wrong with it."""
    try:
        file = pq.ParquetFile(path, buffer_size=READ_BYTES, pre_buffer=False)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: not a readable parquet file (empty, cut off or damaged): {error}") from None
    check_columns(file.schema_arrow, str(path))
    return file


def check_columns(schema: pa.Schema, where: str) -> None:
    """ValueError when a parquet file has no column of texts."""
    if "text" not in schema.names:
        raise ValueError(f"{where}: has no column 'text', only {', '.join(schema.names) or 'none'}")
    kind = schema.field("text").type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not _is_text(kind):
        raise ValueError(f"{where}: its column 'text' holds {kind}, not strings")


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))
