"""What is to be built and what stands there already: a new build, the rest of one, or a finished data set."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prep.plan import Settings
from prep.sources import LocalSource
from prep.split_writer import ROWS
from prep.writer import JOURNAL, journal_config, write_journal
from shared.durable import fsync_folder, sha256_file
from shared.manifest import MANIFEST, Manifest, SourceFile, load_manifest
from shared.tokenizer import Tokenizer


@dataclass(frozen=True)
class Job:
    """Everything that a build reads and makes."""

    spec: str  # SRC as the user gave it
    source: LocalSource
    files: list[SourceFile]
    tokenizer: Tokenizer
    settings: Settings
    out: Path

    @property
    def partial(self) -> Path:
        return self.out.with_name(self.out.name + ".partial")

    @property
    def spec_path(self) -> str:
        """SRC with its path made absolute, so that a later `verify --deep` finds it from anywhere."""
        return str(Path(self.spec).expanduser().absolute())

    def config(self) -> dict[str, Any]:
        """The named values that decide the bytes, as a later start compares them."""
        return {
            **self.settings.fields(),
            "tokenizer": self.tokenizer.identity.sha256,
            "source files": [[file.name, file.size, file.sha256] for file in self.files],
        }


def hash_files(source: LocalSource) -> list[SourceFile]:
    """Name, size and SHA-256 of every file of the source, in order."""

    def identify(name: str) -> SourceFile:
        path = source.path(name)
        return SourceFile(name, path.stat().st_size, sha256_file(path))

    with ThreadPoolExecutor() as pool:
        return list(pool.map(identify, source.names))


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
        write_journal(folder, {"config": job.config()})


def finished(source: LocalSource, settings: Settings, tokenizer: Tokenizer, out: Path) -> Manifest | None:
    """The data set at `out`, if there is one and it is what is asked for; None if nothing is there."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST).is_file():
        raise ValueError(f"{out}: exists and is not a data set; choose another --out")
    manifest = load_manifest(out)
    files = {file.name: file for file in manifest.source.files}
    made = (out / MANIFEST).stat().st_mtime_ns
    known = [
        files[name] for name in source.names if name in files and not _changed(source.path(name), files[name], made)
    ]
    now = {**settings.fields(), "tokenizer": tokenizer.identity.sha256, "source files": _as_lists(known)}
    if len(known) < len(source.names):
        now["source files"] = _as_lists(hash_files(source))
    check_same(config_of(manifest), now, f"{out}: a finished data set with another", "choose another --out")
    return manifest


def _changed(path: Path, file: SourceFile, since: int) -> bool:
    """Whether a file may differ from what it was when the data set was finished; if not, it need not be hashed."""
    now = path.stat()
    return now.st_size != file.size or now.st_mtime_ns >= since


def _as_lists(files: list[SourceFile]) -> list[list[Any]]:
    return [list(asdict(file).values()) for file in files]


def config_of(manifest: Manifest) -> dict[str, Any]:
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
    }


def check_same(before: dict[str, Any], now: dict[str, Any], where: str, advice: str) -> None:
    for field, value in now.items():
        if before.get(field) != value:
            was, is_ = (f" ({before.get(field)}, not {value})", "") if field != "source files" else ("", "")
            raise ValueError(f"{where} {field.replace('_', ' ')}{was}{is_}; give the same one, or {advice}")


def publish(job: Job) -> Manifest:
    """Give a whole data set its name. What may be left of a former try is removed first."""
    for rows in job.partial.glob(f"*/{ROWS}"):
        rows.unlink()
        fsync_folder(rows.parent)
    if job.out.exists():
        job.out.rmdir()  # an empty folder of that name
    job.partial.rename(job.out)
    fsync_folder(job.out.parent)
    return load_manifest(job.out)
