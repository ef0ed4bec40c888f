"""Make a damaged data set whole again: only what is bad is made anew, and nothing replaces a file but its equal.

The manifest is the judge, so a bad one cannot be repaired. A bad shard is encoded again from the documents that the
index says stand in it. A bad index is made from the source and the shards, which show how long each document is. Where
both are bad in one split, only the whole build, beside the data set, can tell what belongs there. Whatever comes out
must have the manifest's hash before it takes the place of the bad file.
"""

import hashlib
import shutil
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from prep.deep import texts_of
from prep.encoder import Encoder
from prep.job import config_of, reopen, source_name
from prep.pipeline import build
from prep.plan import Settings
from prep.reindex import reindex
from prep.sources import LocalSource, tokenizer_file
from prep.split_writer import write_index
from prep.verify import verify
from prep.writer import journal_config
from shared.durable import exclusive, fsync_folder, sha256_file, write_durably
from shared.index import ContentHash, Document, documents_between, read_index
from shared.manifest import BUILD, MANIFEST, TOKENIZER, Manifest, Split, load_build, load_manifest, seal, text_of
from shared.progress import Progress
from shared.provenance import provenance, utc_now
from shared.shards import Shard, shard_header
from shared.stop import Stop
from shared.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from prep.hub import HubSource

WRONG_SOURCE = "the source does not give it; give the --source that the data set was made from; nothing was replaced"
BATCH = 512  # documents encoded at once


class Repair:
    """One repair of the data set in `folder`. It prints a line for each file that was made whole."""

    def __init__(self, folder: Path, source: str | None, tokenizer: str | None, workers: int, stop: Stop) -> None:
        self.folder, self._spec, self._tokenizer = folder.absolute(), source, tokenizer
        self._workers, self._stop, self._progress = workers, stop, Progress()
        self._aside = self.folder.with_name(self.folder.name + ".repair")

    def run(self) -> list[str]:
        """Names of the files that were bad and are not any more. ValueError says what could not be repaired."""
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder}: no such folder; build a data set there with prep tokenize")
        with exclusive(self.folder.with_name(self.folder.name + ".lock"), "prep command"):
            self._manifest = self._load_manifest()
            self._remove_leftovers()
            bad = [problem.file for problem in verify(self.folder).bad]
            self._move_surplus(bad)
            if TOKENIZER in bad:
                self._repair_tokenizer()
            # A bad build.json leaves the indexes unjudged: without its hashes only their content counts.
            splits = [name for name in self._manifest.splits if not self._index_ok(name)]
            shards = [file for file in bad if file in self._shards()]
            self._repair_shards([file for file in shards if self._shards()[file][0] not in splits])
            blind = [file for file in shards if self._shards()[file][0] in splits]
            if blind:
                self._rebuild([*blind, *(self._manifest.splits[name].index.file for name in splits)])
            elif splits:
                self._repair_indexes(splits)
            self._write_build(bad)
            still = verify(self.folder).bad
            if still:
                raise ValueError(f"{self.folder}: still bad: {still[0].file}: {still[0].problem}; tokenize again")
        return bad

    def _load_manifest(self) -> Manifest:
        try:
            return load_manifest(self.folder)
        except ValueError as error:
            raise ValueError(f"{error} (nothing can be repaired without the manifest: tokenize again)") from None

    def _shards(self) -> dict[str, tuple[str, Shard]]:
        return {shard.file: (name, shard) for name, split in self._manifest.splits.items() for shard in split.shards}

    def _known(self) -> set[str]:
        indexes = {split.index.file for split in self._manifest.splits.values()}
        return {MANIFEST, BUILD, TOKENIZER, *indexes, *self._shards()}

    def _remove_leftovers(self) -> None:
        """What a former repair was writing when it was killed."""
        for file in self._known():
            (self.folder / f"{file}.tmp").unlink(missing_ok=True)

    def _move_surplus(self, bad: list[str]) -> None:
        """Files that are no part of the data set go beside it; they may be somebody's."""
        away = self.folder.with_name(self.folder.name + ".surplus")
        for file in sorted(set(bad) - self._known()):
            target = away / file
            if target.exists():
                raise ValueError(f"{self.folder / file}: not part of this data set, and {target} exists; move one away")
            target.parent.mkdir(parents=True, exist_ok=True)
            (self.folder / file).rename(target)
            self._progress.say(f"{file}: not part of this data set; moved to {target}")

    def _repair_tokenizer(self) -> None:
        spec = self._tokenizer or self._recorded("tokenizer")
        if spec is None:
            raise ValueError(
                f"{self.folder / TOKENIZER}: bad, and where it came from is not recorded; give --tokenizer"
            )
        path = tokenizer_file(spec, stop=self._stop, progress=self._progress)
        model = load_tokenizer(path, self._manifest.tokenizer.sha256)
        self._replace(TOKENIZER, model.model)

    def _recorded(self, key: str) -> Any:
        try:
            return load_build(self.folder).get(key)
        except ValueError:
            return None

    def _index_ok(self, name: str) -> bool:
        """Whether the index of a split has the content that the manifest states, and the bytes that build.json does."""
        split, content = self._manifest.splits[name], ContentHash()
        path = self.folder / split.index.file
        try:
            for batch in read_index(self.folder, name):
                content.update(batch)
        except ValueError:
            return False
        stated = (self._recorded("indexes") or {}).get(split.index.file, {}).get("sha256")
        intact = stated is None or (path.is_file() and sha256_file(path) == stated)
        return intact and not path.is_symlink() and content.hexdigest() == split.index.content_sha256

    def _repair_shards(self, files: list[str]) -> None:
        source = self._open_source() if files else None
        for file in files:
            self._stop.check(f"{self.folder}: interrupted; prep repair goes on with the rest")
            assert source is not None
            self._replace(file, self._encode(source, file))

    def _open_source(self) -> "LocalSource | HubSource":
        return reopen(self.folder, self._manifest, self._spec, stop=self._stop, progress=self._progress)

    def _repair_indexes(self, splits: list[str]) -> None:
        source = self._open_source()
        for name, batches in reindex(self.folder, self._manifest, source, splits, self._stop).items():
            stated = self._manifest.splits[name].index
            with TemporaryDirectory(dir=self.folder.parent, prefix=f"{self.folder.name}.repair-") as aside:
                path = Path(aside) / "documents.parquet"
                if write_index(path, stated.file, iter(batches)) != stated:
                    raise ValueError(f"{self.folder / stated.file}: {WRONG_SOURCE}")
                self._replace(stated.file, path.read_bytes())

    def _rebuild(self, files: list[str]) -> None:
        """Make the whole data set again beside the bad one, and take `files` from it. It goes on after a kill."""
        manifest, source = self._manifest, self._manifest.source
        val = manifest.splits.get("val")
        settings = Settings(
            manifest.splits["train"].sequences,
            val.sequences if val else 0,
            manifest.sequence_length,
            manifest.shard_tokens,
            source.order,
            source.seed,
            source.unit_bytes,
        )
        pinned = source_name(source.repository, source.config, source.revision) if source.revision else None
        spec = self._spec or pinned or self._recorded("source")
        if spec is None:
            raise ValueError(f"{self.folder / BUILD}: does not say where the source is; give --source")
        bad = ", ".join(files)
        self._progress.say(f"{bad}: only the whole build can tell what belongs there; building {self._aside}")
        tokenizer = load_tokenizer(self.folder / TOKENIZER, manifest.tokenizer.sha256)
        shutil.rmtree(self._aside, ignore_errors=True)  # of a repair that was killed
        before = journal_config(self._aside.with_name(self._aside.name + ".partial")) or {}
        other = any(before.get(field) != value for field, value in config_of(manifest).items())
        built = build(spec, tokenizer, settings, self._aside, workers=self._workers, restart=other, stop=self._stop)
        if built.splits == manifest.splits:
            for file in files:
                self._replace(file, (self._aside / file).read_bytes())
        shutil.rmtree(self._aside)
        if built.splits != manifest.splits:
            raise ValueError(f"{bad}: {WRONG_SOURCE}")

    def _encode(self, source: "LocalSource | HubSource", file: str) -> bytes:
        """The bytes of a shard, from the texts of its documents."""
        name, shard = self._shards()[file]
        split = self._manifest.splits[name]
        first = _first_token(split, shard)
        tokenizer = load_tokenizer(self.folder / TOKENIZER, self._manifest.tokenizer.sha256)
        encoder, tokens = Encoder(tokenizer), np.empty(shard.tokens, dtype="<u2")
        found = documents_between(self.folder, name, first, first + shard.tokens)
        by_file = sorted(found, key=lambda document: (document.file, document.row))
        for source_file, group in groupby(by_file, key=lambda document: document.file):
            documents = list(group)
            if source_file not in source.names:
                raise ValueError(f"{source_file}: not in the source; give the --source that the data set was made from")
            texts = texts_of(source, source_file, [document.row for document in documents])
            for at in range(0, len(documents), BATCH):
                some = documents[at : at + BATCH]
                encoded = encoder.encode(pa.array([_checked(next(texts), document) for document in some], pa.string()))
                for i, document in enumerate(some):
                    ids = encoded.tokens[encoded.offsets[i] : encoded.offsets[i + 1]][: document.length]
                    a, b = max(document.start, first), min(document.start + document.length, first + shard.tokens)
                    tokens[a - first : b - first] = ids[a - document.start : b - document.start]
        data = shard_header(shard.tokens) + tokens.tobytes()
        if hashlib.sha256(data).hexdigest() != shard.sha256:
            raise ValueError(f"{self.folder / file}: its documents do not give its sha256; nothing was replaced")
        return data

    def _replace(self, file: str, data: bytes) -> None:
        path = self.folder / file
        path.parent.mkdir(exist_ok=True)
        write_durably(path, data)
        fsync_folder(self.folder)
        self._progress.say(f"{file}: made anew")

    def _write_build(self, bad: list[str]) -> None:
        """State the indexes' own bytes anew, where build.json is bad or they were made with another library."""
        stated = {
            split.index.file: {
                "bytes": (self.folder / split.index.file).stat().st_size,
                "sha256": sha256_file(self.folder / split.index.file),
            }
            for split in self._manifest.splits.values()
        }
        record = None if BUILD in bad else load_build(self.folder)
        if record is not None and record["indexes"] == stated:
            return
        known = record or {"source": self._spec, "tokenizer": self._tokenizer, "provenance": provenance(())}
        whole = {key: value for key, value in known.items() if value is not None}
        self._replace(BUILD, text_of(seal({**whole, "repaired": utc_now(), "indexes": stated}, "sha256")))


def _first_token(split: Split, shard: Shard) -> int:
    return sum(before.tokens for before in split.shards[: split.shards.index(shard)])


def _checked(text: str | None, document: Document) -> str:
    if text is None or hashlib.sha256(text.encode()).digest() != document.text_sha256:
        raise ValueError(
            f"row {document.row} of {document.file}: not the text that the data set was made from; give the right "
            "--source; nothing was replaced"
        )
    return text
