"""One split on its way to disk: tokens appended to its shards, rows to its index. Nothing counts before `sync`."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prep.encoder import Offsets
from prep.holdout import Kept
from prep.worker import Result
from shared.durable import fsync_folder, sha256_file, write_all
from shared.index import ROW_GROUP, SCHEMA, ContentHash, index_name
from shared.manifest import Index, LastDocument, Split
from shared.shards import HEADER_BYTES, TOKEN_BYTES, Shard, shard_bytes, shard_header, shard_name

ROWS = "documents.rows"  # the rows of the index so far: Arrow IPC streams, one after another
# The finished shards so far, a line of JSON each: in the journal, each commit would write all of them again.
FINISHED = "shards.jsonl"


class SplitWriter:
    """One split: appends tokens to its shards and rows to its index."""

    def __init__(self, folder: Path, split: str, budget: int, shard_tokens: int, state: dict[str, Any]) -> None:
        self._folder, self._split, self._budget, self._shard_tokens = folder, split, budget, shard_tokens
        self.tokens: int = state.get("tokens", 0)
        self.documents: int = state.get("documents", 0)
        self.utf8_bytes: int = state.get("utf8_bytes", 0)
        self.last_document: dict[str, Any] | None = state.get("last_document")
        self._finished_bytes: int = state.get("finished_bytes", 0)
        self._shards = self._read_finished()
        self._rows_bytes: int = state.get("rows_bytes", 0)
        self._digest = hashlib.sha256()
        self._shard: int | None = None  # file descriptors
        self._rows: int | None = None
        self._restore()

    def state(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "utf8_bytes": self.utf8_bytes,
            "last_document": self.last_document,
            "finished_bytes": self._finished_bytes,
            "rows_bytes": self._rows_bytes,
        }

    def append(self, result: Result, kept: list[Kept], file: str, utf8_bytes: int) -> None:
        """Add the documents of `result` that are for this split; they stay uncommitted until `sync` and the journal."""
        start = self.tokens
        lengths = np.array([k.tokens for k in kept], dtype=np.int32)
        for first, stop in _runs(result.offsets, kept):
            self._append_tokens(result.tokens[first:stop].data.cast("B"))
        which = pa.array([k.document for k in kept], pa.int64())
        rows = pa.record_batch(
            [
                pa.array(start + np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64)]), pa.int64()),
                pa.array(lengths),
                result.ids.take(which),
                result.urls.take(which),
                pa.array([file] * len(kept), pa.string()),
                pa.array(result.rows).take(which),
                pa.array([result.hashes[k.document] for k in kept], pa.binary(32)),
            ],
            schema=SCHEMA,
        )
        self._append_rows(rows)
        self.documents += len(kept)
        self.utf8_bytes += utf8_bytes
        if self.tokens == self._budget:
            last = kept[-1]
            self.last_document = {
                "id": result.ids[last.document].as_py(),
                "tokens_used": last.tokens,
                "tokens_dropped": last.dropped,
            }

    def sync(self) -> None:
        """Make all that was appended durable."""
        for fd in (self._shard, self._rows):
            if fd is not None:
                os.fsync(fd)

    def hashes(self) -> Iterator[bytes]:
        """The text hashes of all documents so far."""
        for batch in self._read_rows():
            yield from batch["text_sha256"].to_pylist()

    def finish(self, sequences: int) -> tuple[Split, dict[str, Any]]:
        """Write the index; the manifest's entry for this split, and build.json's for the index's own bytes."""
        assert self.tokens == self._budget and self.last_document is not None
        name = index_name(self._split)
        path = self._folder / name
        index = write_index(path, name, self._read_rows())
        split = Split(
            sequences=sequences,
            tokens=self.tokens,
            documents=self.documents,
            utf8_bytes=self.utf8_bytes,
            last_document=LastDocument(**self.last_document),
            shards=self._shards,
            index=index,
        )
        return split, {name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}}

    def close(self) -> None:
        for fd in (self._shard, self._rows):
            if fd is not None:
                os.close(fd)
        self._shard = self._rows = None

    def _append_tokens(self, data: memoryview) -> None:
        while len(data):
            room = self._shard_size() - self.tokens % self._shard_tokens
            if self._shard is None:
                self._open_shard()
            assert self._shard is not None
            now, data = data[: room * TOKEN_BYTES], data[room * TOKEN_BYTES :]
            write_all(self._shard, now)
            self._digest.update(now)
            size = self._shard_size()  # before the count moves on to the next shard
            self.tokens += len(now) // TOKEN_BYTES
            if len(now) == room * TOKEN_BYTES:
                os.fsync(self._shard)
                os.close(self._shard)
                self._shard = None
                name = shard_name(self._split, len(self._shards))
                self._finish_shard(Shard(name, size, shard_bytes(size), self._digest.hexdigest()))

    def _finish_shard(self, shard: Shard) -> None:
        self._shards.append(shard)
        line = json.dumps(asdict(shard)).encode() + b"\n"
        path = self._folder / self._split / FINISHED
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            write_all(fd, line)
            os.fsync(fd)
        finally:
            os.close(fd)
        fsync_folder(path.parent)
        self._finished_bytes += len(line)

    def _read_finished(self) -> list[Shard]:
        """The finished shards that the journal knows of."""
        path = self._folder / self._split / FINISHED
        known = path.read_bytes()[: self._finished_bytes] if self._finished_bytes and path.exists() else b""
        if len(known) < self._finished_bytes:
            raise ValueError(_too_short(path))
        return [Shard(**json.loads(line)) for line in known.splitlines()]

    def _shard_size(self) -> int:
        """Tokens of the shard in hand; known before it is written, since the budget is."""
        return min(self._shard_tokens, self._budget - self.tokens // self._shard_tokens * self._shard_tokens)

    def _open_shard(self) -> None:
        path = self._folder / shard_name(self._split, len(self._shards))
        self._shard = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        fsync_folder(path.parent)
        header = shard_header(self._shard_size())
        write_all(self._shard, header)
        self._digest = hashlib.sha256(header)

    def _lists(self) -> dict[str, int]:
        return {ROWS: self._rows_bytes, FINISHED: self._finished_bytes}

    def _append_rows(self, rows: pa.RecordBatch) -> None:
        if self._rows is None:
            path = self._folder / self._split / ROWS
            self._rows = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            fsync_folder(path.parent)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, SCHEMA) as stream:
            stream.write_batch(rows)
        data = sink.getvalue()
        write_all(self._rows, memoryview(data))
        self._rows_bytes += data.size

    def _read_rows(self) -> Iterator[pa.RecordBatch]:
        path = self._folder / self._split / ROWS
        if not self._rows_bytes:
            return
        with path.open("rb") as file:
            while file.tell() < self._rows_bytes:
                yield from pa.ipc.open_stream(file)

    def _restore(self) -> None:
        """Cut off what the journal does not know of, and go on hashing where it stopped."""
        folder = self._folder / self._split
        folder.mkdir(exist_ok=True)
        inside = self.tokens % self._shard_tokens if self.tokens < self._budget else 0
        expected = {Path(shard.file).name: shard.bytes for shard in self._shards}
        if inside:
            expected[Path(shard_name(self._split, len(self._shards))).name] = HEADER_BYTES + inside * TOKEN_BYTES
        expected.update({name: size for name, size in self._lists().items() if size})
        for path in folder.iterdir():
            if path.name not in expected:
                path.unlink()
        for name, size in expected.items():
            path = folder / name
            if not path.exists() or path.stat().st_size < size:
                raise ValueError(_too_short(path))
            os.truncate(path, size)
        if inside:
            path = self._folder / shard_name(self._split, len(self._shards))
            sha256_file(path, self._digest.update)
            self._shard = os.open(path, os.O_WRONLY | os.O_APPEND)


def write_index(path: Path, name: str, batches: Iterator[pa.RecordBatch]) -> Index:
    """Write the rows of an index durably; what the manifest says of it under `name`."""
    content, rows = ContentHash(), 0
    with path.open("wb") as file:
        with pq.ParquetWriter(file, SCHEMA, compression="zstd", write_statistics=["start"]) as writer:
            for table in _regrouped(batches):
                for batch in table.to_batches():
                    content.update(batch)
                rows += len(table)
                writer.write_table(table, row_group_size=ROW_GROUP)
        file.flush()
        os.fsync(file.fileno())
    fsync_folder(path.parent)
    return Index(name, rows, content.hexdigest())


def _too_short(path: Path) -> str:
    return f"{path}: shorter than the journal says; start the build again with --restart"


def _runs(offsets: Offsets, kept: list[Kept]) -> Iterator[tuple[int, int]]:
    """The tokens of the kept documents as few spans (start, stop): neighbours in the unit are one."""
    first = stop = -1
    for k in kept:
        start = int(offsets[k.document])
        if start != stop:
            if stop > first:
                yield first, stop
            first = start
        stop = start + k.tokens
    if stop > first:
        yield first, stop


def _regrouped(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.Table]:
    """The same rows in tables of ROW_GROUP rows, so that the file does not show how they came."""
    pending = SCHEMA.empty_table()
    for batch in batches:
        pending = pa.concat_tables([pending, pa.Table.from_batches([batch])])
        while len(pending) >= ROW_GROUP:
            yield pending.slice(0, ROW_GROUP).combine_chunks()
            pending = pending.slice(ROW_GROUP)
    if len(pending):
        yield pending.combine_chunks()
