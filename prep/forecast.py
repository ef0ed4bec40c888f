"""What a build will take: units, documents, download, disk, time. Estimates, from footers and a short measurement.

The bytes of text that a parquet unit holds stand in the footer. How many tokens they make, and how fast, is measured on
a text that every Python has, so both are good to some ten percent for English and say nothing of other languages.
"""

import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from prep.ahead import BYTES_AHEAD
from prep.encoder import Encoder
from prep.plan import Settings
from prep.sources import LocalSource, Unit, kind_of
from shared.progress import duration
from shared.shards import TOKEN_BYTES

if TYPE_CHECKING:
    from prep.hub import HubSource

SAMPLE_CHARACTERS = 400_000
INDEX_BYTES = 200  # a row of documents.parquet and the journal's copy of it, roughly
UNPACKED = 3  # bytes of text in a byte of .jsonl.zst, roughly


@dataclass(frozen=True)
class Speed:
    """What this machine was measured to do with this tokenizer, on one core."""

    bytes_per_token: float
    tokens_per_second: float


@dataclass(frozen=True)
class Forecast:
    """What a build needs, of what there is. `documents` counts rows, None where a file's length is not known yet.

    `enough` is False when the source seems to hold fewer tokens than are wanted.
    """

    units: int
    units_listed: int
    documents: int | None
    tokens: int
    download_bytes: int
    disk_needed: int
    disk_free: int
    seconds: float
    tokens_per_second: float
    workers: int
    enough: bool

    def json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        documents = "?" if self.documents is None else f"{self.documents:,}"
        rate = f"{self.tokens_per_second / 1e6:.1f} M tokens/s measured on one core x {self.workers} workers"
        lines = [
            f"to read      about {self.units:,} of {self.units_listed:,} units, {documents} documents",
            f"to download  about {self.download_bytes / 1e6:,.1f} MB",
            f"on disk      about {self.disk_needed / 1e6:,.1f} MB, {self.disk_free / 1e6:,.1f} MB are free",
            f"to encode    about {duration(self.seconds)} ({rate}), not counting the download",
        ]
        if not self.enough:
            lines.append("the source seems too small for this; the build will tell how many sequences it holds")
        return lines


def measure(encoder: Encoder) -> Speed:
    """Encode the prose of Python's own help, in documents of a web page's length."""
    from pydoc_data.topics import topics

    prose = "\n".join(topics.values())[:SAMPLE_CHARACTERS]
    text = pa.array([prose[i : i + 4000] for i in range(0, len(prose), 4000)], pa.string())
    encoder.encode(text)  # the first time costs more than all later ones
    began = time.perf_counter()
    tokens = len(encoder.encode(text).tokens)
    return Speed(len(prose.encode()) / tokens, tokens / (time.perf_counter() - began))


def forecast(
    units: Iterable[Unit],
    settings: Settings,
    text_bytes: Callable[[Unit], float],
    fetched_bytes: Callable[[Unit], int],
    speed: Speed,
    workers: int,
    disk_free: int,
) -> Forecast:
    """Read `units`, in the order of the plan, until their text fills the budget. Pure."""
    listed, wanted = list(units), sum(settings.budget().values())
    tokens, needed = 0.0, 0
    while needed < len(listed) and tokens < wanted:
        tokens += text_bytes(listed[needed]) / speed.bytes_per_token
        needed += 1
    rows = [unit.rows for unit in listed[:needed]]
    documents = None if None in rows else sum(n or 0 for n in rows)
    download = sum(map(fetched_bytes, listed[:needed]))
    return Forecast(
        units=needed,
        units_listed=len(listed),
        documents=documents,
        tokens=wanted,
        download_bytes=download,
        disk_needed=wanted * TOKEN_BYTES + (documents or 0) * INDEX_BYTES + min(download, BYTES_AHEAD),
        disk_free=disk_free,
        seconds=wanted / speed.tokens_per_second / workers,
        tokens_per_second=speed.tokens_per_second,
        workers=workers,
        enough=tokens >= wanted,
    )


def forecast_source(
    source: "LocalSource | HubSource",
    units: Iterable[Unit],
    settings: Settings,
    encoder: Encoder,
    workers: int,
    folder: Path,
) -> Forecast:
    """The forecast for an open source and its units in the order of the plan; `folder` is on the disk to be used."""
    listed = list(units)
    rows: dict[str, int] = {}
    for unit in listed:
        rows[unit.file] = rows.get(unit.file, 0) + (unit.rows or 0)
    share = _text_share(source)

    def text_bytes(unit: Unit) -> float:
        if kind_of(unit.file) == ".parquet":
            return unit.unpacked * share
        size = source.file_size(unit.file)
        return size * UNPACKED if unit.rows is None else size * unit.rows / max(1, rows[unit.file])

    def fetched_bytes(unit: Unit) -> int:
        return 0 if isinstance(source, LocalSource) else source.size(unit)

    free = shutil.disk_usage(folder).free
    return forecast(listed, settings, text_bytes, fetched_bytes, measure(encoder), workers, free)


def _text_share(source: "LocalSource | HubSource") -> float:
    """The text's share in the unpacked bytes of the first parquet file; the others are taken to be alike."""
    name = next((name for name in source.names if kind_of(name) == ".parquet"), None)
    if name is None:
        return 1.0
    metadata, text, total = source.metadata(name), 0, 0
    for group in range(metadata.num_row_groups):
        total += metadata.row_group(group).total_byte_size
        for i in range(metadata.num_columns):
            column = metadata.row_group(group).column(i)
            text += column.total_uncompressed_size if column.path_in_schema == "text" else 0
    return text / total if total else 1.0
