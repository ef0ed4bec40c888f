"""What a build will take: units, documents, download, disk, time. Estimates, from footers and a short measurement.

The bytes of text that a parquet unit holds stand in the footer. How many tokens they make, and how fast, is measured on
a text that every Python has, so both are good to some ten percent for English and say nothing of other languages.

The units of a build are those of all files, so a build reads every footer. A plan does not: of a source on the Hub with
thousands of files, some spread evenly stand for all, since each footer costs two requests of the 3,000 that the Hub
grants in 5 minutes. What their units hold is what a random part of the source holds, which is what a build reads.
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
from prep.job import pin_of
from prep.plan import Plan, Settings
from prep.sources import LocalSource, Unit, all_units, kind_of, open_source
from shared.progress import Progress, duration
from shared.shards import TOKEN_BYTES
from shared.stop import Stop
from shared.tokenizer import Tokenizer

if TYPE_CHECKING:
    from prep.hub import HubSource

SAMPLE_CHARACTERS = 400_000
INDEX_BYTES = 200  # a row of documents.parquet and the journal's copy of it, roughly
FOOTERS = 32  # files that `plan` looks into, of a source on the Hub
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
    share: float  # of the source's bytes, in the files that all this was judged by

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
        if self.share < 1:
            lines.append(f"judged by     {self.share:.1%} of the source; the build reads the footers of all its files")
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
    share: float = 1.0,
    listing_bytes: int = 0,
) -> Forecast:
    """Read `units`, in the order of the plan, until their text fills the budget. Pure.

    They may be a `share` of the source's units; where those are not enough, as many more are taken to be like them.
    `listing_bytes` of text files are downloaded whatever is read of them, for their lines must be counted.
    """
    listed, wanted = list(units), sum(settings.budget().values())
    tokens, needed = 0.0, 0
    while needed < len(listed) and tokens < wanted:
        tokens += text_bytes(listed[needed]) / speed.bytes_per_token
        needed += 1
    more = min(1 / share, wanted / tokens) if 0 < tokens < wanted else 1.0
    rows = [unit.rows for unit in listed[:needed]]
    documents = None if None in rows else round(sum(n or 0 for n in rows) * more)
    download = round(sum(map(fetched_bytes, listed[:needed])) * more + listing_bytes / share)
    return Forecast(
        units=round(needed * more),
        units_listed=round(len(listed) / share),
        documents=documents,
        tokens=wanted,
        download_bytes=download,
        disk_needed=wanted * TOKEN_BYTES + (documents or 0) * INDEX_BYTES + min(download, BYTES_AHEAD),
        disk_free=disk_free,
        seconds=wanted / speed.tokens_per_second / workers,
        tokens_per_second=speed.tokens_per_second,
        workers=workers,
        enough=tokens * more >= wanted,
        share=share,
    )


def sampled(source: "LocalSource | HubSource") -> tuple[list[str], float]:
    """Files that stand for all of `source`, spread evenly over it, and their share of its bytes."""
    names, last = source.names, len(source.names) - 1
    if isinstance(source, LocalSource) or len(names) <= FOOTERS:
        return names, 1.0
    chosen = [names[i * last // (FOOTERS - 1)] for i in range(FOOTERS)]
    return chosen, sum(map(source.file_size, chosen)) / max(1, sum(map(source.file_size, names)))


def forecast_source(
    source: "LocalSource | HubSource",
    units: Iterable[Unit],
    settings: Settings,
    encoder: Encoder,
    workers: int,
    folder: Path,
    share: float = 1.0,
) -> Forecast:
    """The forecast for an open source and its units in the order of the plan; `folder` is on the disk to be used.

    `share` is that of `sampled`, where the units are those of its files.
    """
    listed = list(units)
    rows: dict[str, int] = {}
    for unit in listed:
        rows[unit.file] = rows.get(unit.file, 0) + (unit.rows or 0)
    of_text = _text_share(source)

    def text_bytes(unit: Unit) -> float:
        if kind_of(unit.file) == ".parquet":
            return unit.unpacked * of_text
        size = source.file_size(unit.file) * (UNPACKED if kind_of(unit.file) == ".jsonl.zst" else 1)
        return size if unit.rows is None else size * unit.rows / max(1, rows[unit.file])

    def fetched_bytes(unit: Unit) -> int:
        return 0 if unit in uncounted else source.size(unit)

    uncounted = {unit for unit in listed if unit.rows is None and kind_of(unit.file) != ".jsonl.zst"}
    listing = sum(map(source.size, uncounted))
    free = shutil.disk_usage(folder).free
    return forecast(listed, settings, text_bytes, fetched_bytes, measure(encoder), workers, free, share, listing)


def plan(
    spec: str,
    tokenizer: Tokenizer,
    settings: Settings,
    out: Path,
    *,
    workers: int,
    restart: bool,
    stop: Stop,
    progress: Progress,
) -> Forecast:
    """What a build would take, found without changing anything. ValueError for what is wrong with the source."""
    out = out.absolute()
    source = open_source(spec, pin=pin_of(spec, out, restart), stop=stop, progress=progress)
    names, share = sampled(source)
    tracks = Plan(_units(source, settings.unit_bytes, names), settings.order, settings.seed).tracks
    disk = next(folder for folder in (out, *out.parents) if folder.is_dir())
    return forecast_source(source, tracks, settings, Encoder(tokenizer), workers, disk, share)


def _units(source: "LocalSource | HubSource", unit_bytes: int, names: list[str]) -> list[Unit]:
    """The units of files. A text file that is still on the Hub is one, of unknown length: to count its lines it would
    have to be downloaded, as a build does."""
    far = [Unit(name, 0, None) for name in names if kind_of(name) != ".parquet"]
    far = [unit for unit in far if source.size(unit)]
    here = [name for name in names if name not in {unit.file for unit in far}]
    return sorted(all_units(source, unit_bytes, here) + far, key=lambda unit: unit.file.encode())


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
