"""What is to be built and what stands there already: a new build, the rest of one, or a finished data set."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prep.plan import Settings
from prep.sources import HUB, LocalSource, Pin, open_source
from prep.split_writer import FINISHED, ROWS
from prep.writer import JOURNAL, journal_config, write_journal
from shared.durable import fsync_folder
from shared.manifest import (
    BUILD,
    FORMAT_VERSION,
    MANIFEST,
    Manifest,
    Skipped,
    Source,
    SourceFile,
    Split,
    load_build,
    load_manifest,
)
from shared.progress import Progress
from shared.stop import Stop
from shared.tokenizer import Tokenizer

if TYPE_CHECKING:
    from prep.hub import HubSource

DOWNLOAD = "download"  # what was fetched from the Hub for the units under way
FOOTERS = "footers"  # those of its parquet files, which every start needs


@dataclass(frozen=True)
class Job:
    """Everything that a build reads and makes."""

    spec: str  # SRC as the user gave it
    source: "LocalSource | HubSource"
    files: list[SourceFile]
    tokenizer: Tokenizer
    settings: Settings
    out: Path
    tokenizer_spec: str | None = None  # TOK as the user gave it

    @property
    def partial(self) -> Path:
        return self.out.with_name(self.out.name + ".partial")

    @property
    def spec_path(self) -> str:
        """SRC with its path made absolute, so that a later `verify --deep` finds it from anywhere."""
        return findable(self.spec)

    def config(self) -> dict[str, Any]:
        """The named values that decide the bytes, as a later start compares them."""
        return _config(self.settings, self.tokenizer, self.files, self.source)

    def manifest(self, splits: dict[str, Split], skipped: Skipped) -> Manifest:
        """Of the finished data set; its id waits for `shared.manifest.seal`."""
        source, settings = self.source, self.settings
        return Manifest(
            format_version=FORMAT_VERSION,
            source=Source(
                kind="files" if source.repository is None else "hf",
                repository=source.repository,
                config=source.config,
                revision=source.revision,
                files=self.files,
                order=settings.order,
                seed=settings.seed,
                unit_bytes=settings.unit_bytes,
                holdout_threshold=str(settings.holdout_threshold()),
            ),
            tokenizer=self.tokenizer.identity,
            sequence_length=settings.sequence_length,
            shard_tokens=settings.shard_tokens,
            splits=splits,
            skipped=skipped,
            id="",
        )


def findable(spec: str) -> str:
    return spec if spec.startswith(HUB) else str(Path(spec).expanduser().absolute())


def source_name(repository: str | None, config: str | None, revision: str | None) -> str:
    """Where the files come from, as the manifest states it."""
    return "files" if repository is None else f"{HUB}{repository}@{revision}" + (f"?config={config}" if config else "")


def hash_files(source: "LocalSource | HubSource") -> list[SourceFile]:
    """Name, size and SHA-256 of every file of the source, in order."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(source.identify, source.names))


def pin_of(spec: str, out: Path, restart: bool) -> Pin | None:
    """The commit and files that an earlier start of the same command found, so that a moved branch changes nothing."""
    if not spec.startswith(HUB):
        return None
    if (out / MANIFEST).is_file():
        return _pinned(spec, out)
    partial = out.with_name(out.name + ".partial")
    if restart or not partial.is_dir():
        return None
    if (before := journal_config(partial)) is None:
        return _pinned(spec, partial) if (partial / MANIFEST).is_file() else None
    if before.get("spec") != spec:
        return None
    return Pin(before["revision"], [SourceFile(*fields) for fields in before["source files"]])


def _pinned(spec: str, folder: Path) -> Pin | None:
    source = load_manifest(folder).source
    if source.revision is None or load_build(folder).get("source") != spec:
        return None
    return Pin(source.revision, source.files)


def reopen(
    folder: Path, manifest: Manifest, spec: str | None, *, stop: Stop | None = None, progress: Progress | None = None
) -> "LocalSource | HubSource":
    """The source of the finished data set in `folder`: where `spec` says, by default where the data set says."""
    source = manifest.source
    if spec is None and source.revision is not None:
        name = source_name(source.repository, source.config, source.revision)
        return open_source(name, pin=Pin(source.revision, source.files), stop=stop, progress=progress)
    spec = spec or load_build(folder).get("source")
    if spec is None:
        raise ValueError(f"{folder / BUILD}: does not say where the source is; give --source")
    return open_source(spec, stop=stop, progress=progress)


def prepare(job: Job, restart: bool) -> None:
    """Make `<out>.partial/` ready: a new build, which starts with its journal, or one that builds the same."""
    folder, advice = job.partial, "--restart discards it"
    if folder.exists() and any(path.name != JOURNAL + ".tmp" for path in folder.iterdir()):
        if not (folder / JOURNAL).exists() and not (folder / MANIFEST).exists():
            raise ValueError(f"{folder}: not empty and not a build of ours; move it away or choose another --out")
        if restart:
            shutil.rmtree(folder)
        elif (before := journal_config(folder)) is not None:
            check_same(before, job.config(), f"{folder}: the unfinished build there has another", advice)
        else:
            check_same(config_of(load_manifest(folder)), job.config(), f"{folder}: has another", advice)
    folder.mkdir(exist_ok=True)
    if not (folder / JOURNAL).exists() and not (folder / MANIFEST).exists():
        write_journal(folder, {"config": {**job.config(), "spec": job.spec, "revision": job.source.revision}})
    discard(folder / DOWNLOAD)


def finished(source: "LocalSource | HubSource", settings: Settings, tokenizer: Tokenizer, out: Path) -> Manifest | None:
    """The data set at `out`, if there is one and it is what is asked for; None if nothing is there."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST).is_file():
        raise ValueError(f"{out}: exists and is not a data set; choose another --out")
    manifest = load_manifest(out)
    known = _known(source, manifest, (out / MANIFEST).stat().st_mtime_ns) if isinstance(source, LocalSource) else []
    if len(known) < len(source.names):
        known = hash_files(source)
    now = _config(settings, tokenizer, known, source)
    check_same(config_of(manifest), now, f"{out}: a finished data set with another", "choose another --out")
    return manifest


def _known(source: LocalSource, manifest: Manifest, made: int) -> list[SourceFile]:
    """The files that are as they were when the data set was made, which need not be hashed again."""
    files = {file.name: file for file in manifest.source.files}
    return [
        files[name] for name in source.names if name in files and not _changed(source.path(name), files[name], made)
    ]


def _changed(path: Path, file: SourceFile, since: int) -> bool:
    """Whether a file may differ from what it was when the data set was finished; if not, it need not be hashed."""
    now = path.stat()
    return now.st_size != file.size or now.st_mtime_ns >= since


def _as_lists(files: list[SourceFile]) -> list[list[Any]]:
    return [list(asdict(file).values()) for file in files]


def _config(
    settings: Settings, tokenizer: Tokenizer, files: list[SourceFile], source: "LocalSource | HubSource"
) -> dict[str, Any]:
    return {
        **settings.fields(),
        "tokenizer": tokenizer.identity.sha256,
        "source files": _as_lists(files),
        "source": source_name(source.repository, source.config, source.revision),
    }


def config_of(manifest: Manifest) -> dict[str, Any]:
    """The same of a finished data set."""
    val = manifest.splits.get("val")
    return {
        "train_sequences": manifest.splits["train"].sequences,
        "val_sequences": val.sequences if val else 0,
        "sequence_length": manifest.sequence_length,
        "shard_tokens": manifest.shard_tokens,
        "order": manifest.source.order,
        "seed": manifest.source.seed,
        "unit_bytes": manifest.source.unit_bytes,
        "tokenizer": manifest.tokenizer.sha256,
        "source files": _as_lists(manifest.source.files),
        "source": source_name(manifest.source.repository, manifest.source.config, manifest.source.revision),
    }


def check_same(before: dict[str, Any], now: dict[str, Any], where: str, advice: str) -> None:
    """ValueError names the first field that differs."""
    for field, value in now.items():
        if before.get(field) != value:
            both = "" if field == "source files" else f" ({before.get(field)}, not {value})"
            raise ValueError(f"{where} {field.replace('_', ' ')}{both}; give the same one, or {advice}")


def discard(folder: Path) -> None:
    """Remove what was fetched. It is renamed first, so that a thread which still fetches cannot put anything in it."""
    gone = folder.with_name(folder.name + ".gone")
    shutil.rmtree(gone, ignore_errors=True)
    if folder.exists():
        folder.rename(gone)
        shutil.rmtree(gone)


def publish(job: Job) -> Manifest:
    """Give a whole data set its name. What may be left of a former try is removed first."""
    discard(job.partial / DOWNLOAD)
    discard(job.partial / FOOTERS)
    for path in [*job.partial.glob(f"*/{ROWS}"), *job.partial.glob(f"*/{FINISHED}")]:
        path.unlink()
        fsync_folder(path.parent)
    if job.out.exists():
        job.out.rmdir()  # an empty folder of that name
    job.partial.rename(job.out)
    fsync_folder(job.out.parent)
    return load_manifest(job.out)
