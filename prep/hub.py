"""A dataset on the Hugging Face Hub as a source: pinned to a commit, listed, and read only where it is needed.

Of a parquet file the footer is read, then one span a unit. Files that lie whole in the Hub's cache are read there.
Anything but parquet is downloaded whole into that cache, and so are files whose sha256 the Hub does not state.
"""

import logging
import re
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import build_hf_headers, disable_progress_bars

from prep.downloads import Downloads
from prep.hub_listing import LOCAL_FILES, cache_of, offline, pin_now
from prep.sources import HUB, Pin, Unit, check_columns, kind_of, open_parquet
from prep.spans import TAIL, footer, footer_length, open_span, span_of
from prep.transfers import Transfers
from shared.durable import sha256_file, write_durably
from shared.manifest import SourceFile
from shared.progress import Progress
from shared.stop import Stop

SPEC = re.compile(r"hf://(?P<repository>[^/@?]+/[^/@?]+)(?:@(?P<revision>[^?]+))?(?:\?config=(?P<config>[^&?]+))?")
TOKENIZER_SPEC = re.compile(r"hf://(?P<repository>[^/@?]+/[^/@?]+)(?:@(?P<revision>[^/?]+))?/(?P<file>[^?]+)")
CONNECTIONS = 8


def open_hub(spec: str, pin: Pin | None, stop: Stop, progress: Progress) -> "HubSource":
    """The dataset that SRC names; at the commit and with the files of `pin`, or at what the Hub says now."""
    found = SPEC.fullmatch(spec)
    if not found:
        raise ValueError(f"{spec}: expected hf://OWNER/NAME[@REVISION][?config=NAME]")
    _quieten(progress.say)
    transfers = Transfers(stop, progress.say, LOCAL_FILES)
    repository, config = found["repository"], found["config"]
    if pin is None:
        pin = pin_now(transfers, progress.say, spec, repository, found["revision"] or "main", config)
    return HubSource(repository, config, pin, transfers, progress)


def fetch_tokenizer(spec: str, stop: Stop, progress: Progress) -> Path:
    """Where TOK's file lies once it is in the Hub's cache."""
    found = TOKENIZER_SPEC.fullmatch(spec)
    if not found:
        raise ValueError(f"{spec}: expected hf://OWNER/NAME[@REVISION]/FILE.model")
    _quieten(progress.say)
    repository, revision, file = found["repository"], found["revision"] or "main", found["file"]
    if constants.HF_HUB_OFFLINE:
        path = try_to_load_from_cache(repository, file, revision=revision)
        if not isinstance(path, str):
            raise ValueError(offline(spec, "give a local file: --tokenizer FILE.model"))
        return Path(path)
    transfers = Transfers(stop, progress.say, "give a local file: --tokenizer FILE.model")
    return Path(transfers.call(spec, lambda: hf_hub_download(repository, file, revision=revision)))


@dataclass(frozen=True)
class Fetched:
    """What a worker sees of the source: what the parent has put on this disk. It never asks the Hub for anything."""

    address: str
    revision: str
    folder: Path  # of spans
    footers: Path
    numbers: dict[str, int]
    files: dict[str, SourceFile]
    snapshot: Path  # of whole files; those of .zst come while the workers are at work
    whole: set[str]

    def path(self, name: str) -> Path:
        return self.snapshot / name

    def where(self, name: str) -> str:
        return f"{self.address}/{name}"

    def stamp(self, name: str) -> int | None:
        return 0  # a file of a commit never changes

    def footer_path(self, name: str) -> Path:
        """Named by what it belongs to, so that one that was kept cannot be taken for another's."""
        return self.footers / f"{self.numbers[name]}-{self.revision}-{self.files[name].sha256}.footer"

    def span_path(self, unit: Unit) -> Path:
        assert unit.groups is not None
        return self.folder / f"{self.numbers[unit.file]}-{unit.groups[0]}.span"

    def parquet(self, unit: Unit) -> pq.ParquetFile:
        if unit.file in self.whole:
            return open_parquet(self.path(unit.file))
        assert unit.groups is not None
        metadata = footer(self.footer_path(unit.file))
        return open_span(self.span_path(unit), metadata, unit.groups, self.files[unit.file].size)


class HubSource:
    """The files of one config at one commit. Spans and footers lie in a temporary folder, or in those of `work_in`."""

    def __init__(self, repository: str, config: str | None, pin: Pin, transfers: Transfers, progress: Progress) -> None:
        self.repository, self.config, self.revision = repository, config, pin.revision
        self._files = {file.name: file for file in pin.files}
        self.names = sorted(self._files, key=lambda name: name.encode())
        self._transfers, self._progress = transfers, progress
        self._snapshot = cache_of(repository) / "snapshots" / pin.revision
        self._downloads = Downloads(cache_of(repository) / "blobs")
        self._here: Fetched | None = None
        self._whole: set[str] = set()
        self._spans: dict[Unit, tuple[int, int]] = {}
        self._locks: defaultdict[object, threading.Lock] = defaultdict(threading.Lock)
        self._connections = threading.BoundedSemaphore(CONNECTIONS)
        for name in self.names:
            path = try_to_load_from_cache(repository, name, revision=pin.revision, repo_type="dataset")
            if isinstance(path, str) and Path(path).stat().st_size == self._files[name].size:
                self._whole.add(name)

    @property
    def address(self) -> str:
        return f"{HUB}{self.repository}@{self.revision}"

    @property
    def folder(self) -> Path:
        return self.fetched().folder

    def work_in(self, folder: Path, footers: Path) -> None:
        """Keep what is fetched in `folder`, which must be empty, and in `footers`, where what is there is used."""
        numbers = {name: number for number, name in enumerate(self.names)}
        self._here = Fetched(
            self.address, self.revision, folder, footers, numbers, self._files, self._snapshot, self._whole
        )

    def where(self, name: str) -> str:
        return f"{self.address}/{name}"

    def stamp(self, name: str) -> int | None:
        return 0

    def path(self, name: str) -> Path:
        """The whole file on this disk; downloaded into the Hub's cache if need be, which the progress line shows."""
        try:
            return self._download(name, lambda: self._progress.show(self._downloads.line))
        finally:
            self._progress.clear()

    def fetching(self) -> str:
        """How the whole files come that `fetch` brings just now; empty when there are none."""
        return self._downloads.line()

    def file_size(self, name: str) -> int:
        return self._files[name].size

    def identify(self, name: str) -> SourceFile:
        """Name, size and sha256 of a file: as the Hub states them, or hashed where it states no sha256."""
        if not self._files[name].sha256:
            self._files[name] = replace(self._files[name], sha256=sha256_file(self.path(name)))
        return self._files[name]

    def metadata(self, name: str) -> pq.FileMetaData:
        """The footer of a parquet file. ValueError when it is none or has no text."""
        if name in self._whole:
            with open_parquet(self._snapshot / name) as file:
                return file.metadata
        path = self.fetched().footer_path(name)
        with self._locks[path]:
            if not path.exists():
                self._fetch_footer(name, path)
            try:
                metadata = footer(path)
            except (OSError, pa.ArrowException) as error:
                path.unlink()
                raise ValueError(f"{self.where(name)}: not a readable parquet file: {error}") from None
        check_columns(metadata.schema.to_arrow_schema(), self.where(name))
        return metadata

    def parquet(self, unit: Unit) -> pq.ParquetFile:
        return self.fetched().parquet(unit)

    def fetch(self, unit: Unit) -> None:
        """Put what `unit` reads on this disk."""
        if kind_of(unit.file) != ".parquet":
            self._download(unit.file, lambda: None)
        if unit.file in self._whole:
            return
        path = self.fetched().span_path(unit)
        with self._locks[path], self._connections:
            if not path.exists():
                aside = path.with_suffix(".part")
                with aside.open("wb") as sink:
                    self._read(unit.file, *self._span(unit), sink)
                aside.replace(path)

    def size(self, unit: Unit) -> int:
        """Bytes that `fetch` will bring."""
        if unit.file in self._whole:
            return 0
        if unit.groups is None:
            return self.file_size(unit.file)
        first, stop = self._span(unit)
        return stop - first

    def release(self, unit: Unit) -> None:
        """Give back the room that `unit` took."""
        if unit.groups is not None:
            self.fetched().span_path(unit).unlink(missing_ok=True)

    def close(self) -> None:
        self._transfers.close()

    def fetched(self) -> Fetched:
        """What a worker is given."""
        with self._locks["folder"]:
            if self._here is None:
                self._temporary = tempfile.TemporaryDirectory(prefix="prep-hub-")  # removed when this object goes
                self.work_in(Path(self._temporary.name), Path(self._temporary.name))
            assert self._here is not None
            return self._here

    def _span(self, unit: Unit) -> tuple[int, int]:
        assert unit.groups is not None
        if unit not in self._spans:
            self._spans[unit] = span_of(self.metadata(unit.file), unit.groups)
        return self._spans[unit]

    def _fetch_footer(self, name: str, path: Path) -> None:
        size, tail, whole = self._files[name].size, BytesIO(), BytesIO()
        self._read(name, max(0, size - TAIL), size, tail)
        length = footer_length(tail.getvalue(), self.where(name))
        self._read(name, max(0, size - length), size, whole)
        write_durably(path, whole.getvalue())

    def _download(self, name: str, meanwhile: Callable[[], None]) -> Path:
        with self._locks[name]:
            if name not in self._whole:
                self._require_online(name)
                with self._downloads.of(self._files[name].size):
                    self._transfers.call(
                        self.where(name),
                        lambda: hf_hub_download(self.repository, name, revision=self.revision, repo_type="dataset"),
                        meanwhile,
                    )
                self._check_size(name)
                self._whole.add(name)
            return self._snapshot / name

    def _read(self, name: str, first: int, stop: int, sink: BinaryIO) -> None:
        self._require_online(name)
        url = hf_hub_url(self.repository, name, revision=self.revision, repo_type="dataset")
        file = self._files[name]
        self._transfers.read(self.where(name), url, build_hf_headers(), first, stop, sink, file.size, file.sha256)

    def _check_size(self, name: str) -> None:
        found, stated = (self._snapshot / name).stat().st_size, self._files[name].size
        if found != stated:
            raise ValueError(f"{self.where(name)}: has {found} bytes, the Hub's listing says {stated}")

    def _require_online(self, name: str) -> None:
        if constants.HF_HUB_OFFLINE:
            missing = [name for name in self.names if name not in self._whole]
            what = f"{self.address}: {len(missing)} of its {len(self.names)} files, the first of them {missing[0]}"
            raise ValueError(offline(what, LOCAL_FILES))


def _quieten(say: Callable[[str], None]) -> None:
    """Let the Hub's client report what it waits for by `say`, and nothing on stderr."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(f"the Hub's client: {' '.join(record.getMessage().split())}")

    disable_progress_bars()
    logger = logging.getLogger("huggingface_hub")
    logger.handlers, logger.propagate = [Handler(level=logging.WARNING)], False
