"""What a worker process does: read a unit, encode it, decide each document's side. It writes nothing."""

import ctypes
import hashlib
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from prep.encoder import Encoder, Ids, Offsets
from prep.holdout import is_val
from prep.rows import RowReader, Rows
from prep.sources import Readable, Unit

TEXT_BYTES = 32 << 20  # text that a result holds at most, but for one batch of rows
ORPHAN_CHECK = 0.2  # seconds
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc, malloc.h
PARITY = 1000  # one document in so many is encoded by plain SentencePiece as well


@dataclass(frozen=True)
class Result:
    """The documents of one piece of a unit, ready to be written.

    `tokens` (N,) uint16 holds them end to end, `<s>` ids `</s>` each; `offsets` (D+1,) int64 into it; `utf8_bytes`,
    `rows` (D,) int64; `hashes` SHA-256 of the texts; `empty_rows` rows without text. `next_row`: the row after
    the last one read; `ended`: the .zst file has no further row.
    """

    tokens: Ids
    offsets: Offsets
    utf8_bytes: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    empty_rows: npt.NDArray[np.int64]
    hashes: list[bytes]
    val_side: list[bool]
    ids: pa.Array
    urls: pa.Array
    text_bytes: int
    parity: int
    next_row: int
    ended: bool


class Worker:
    """Reads and encodes units; a process has one."""

    def __init__(
        self, source: Readable, stamps: dict[str, int | None], encoder: Encoder, seed: int, limit: int
    ) -> None:
        self._source, self._stamps = source, stamps
        self._encoder = encoder
        self._reader = RowReader(source)
        self._seed, self._limit = seed, limit

    def run(self, unit: Unit, row: int, stop: int) -> Result:
        self._check_unchanged(unit.file)
        piece = self._reader.read(unit, row, stop, TEXT_BYTES)
        text = pa.chunked_array([rows.text for rows in piece.rows], _common_type(piece.rows)).combine_chunks()
        encoded = self._encoder.encode(text)
        hashes = hash_texts(text)
        return Result(
            tokens=encoded.tokens,
            offsets=encoded.offsets,
            utf8_bytes=encoded.utf8_bytes,
            rows=np.concatenate([rows.row for rows in piece.rows] or [np.empty(0, np.int64)]),
            empty_rows=np.concatenate([rows.empty for rows in piece.rows] or [np.empty(0, np.int64)]),
            hashes=hashes,
            val_side=[is_val(digest, self._seed, self._limit) for digest in hashes],
            ids=pa.chunked_array([rows.id for rows in piece.rows], pa.string()).combine_chunks(),
            urls=pa.chunked_array([rows.url for rows in piece.rows], pa.string()).combine_chunks(),
            text_bytes=int(pc.sum(pc.binary_length(text)).as_py() or 0),
            parity=self._check_parity(text, encoded.tokens, encoded.offsets, hashes, unit.file),
            next_row=piece.next_row,
            ended=piece.ended,
        )

    def _check_unchanged(self, name: str) -> None:
        if self._source.stamp(name) != self._stamps[name]:
            raise ValueError(f"{self._source.where(name)}: changed while it was being read; start again with --restart")

    def _check_parity(self, text: pa.Array, tokens: Ids, offsets: Offsets, hashes: list[bytes], file: str) -> int:
        """Compare a sample with plain SentencePiece, the first document of each piece in it; returns its size."""
        sample = [i for i, digest in enumerate(hashes) if i == 0 or int.from_bytes(digest[-4:], "big") % PARITY == 0]
        for i in sample:
            if not np.array_equal(self._encoder.reference(text[i].as_py()), tokens[offsets[i] : offsets[i + 1]]):
                raise ValueError(
                    f"{file}: the document with text sha256 {hashes[i].hex()} is encoded otherwise than by "
                    "SentencePiece; nothing of it was written; please report this with the tokenizer's sha256"
                )
        return len(sample)


def _common_type(rows: list[Rows]) -> pa.DataType:
    return rows[0].text.type if rows else pa.string()


def hash_texts(text: pa.Array) -> list[bytes]:
    raw = text.cast(pa.large_binary())
    starts = np.frombuffer(raw.buffers()[1], dtype="<i8")[raw.offset : raw.offset + len(raw) + 1].tolist()
    data = memoryview(raw.buffers()[2] or b"")
    return [hashlib.sha256(data[a:b]).digest() for a, b in itertools.pairwise(starts)]


_worker: Worker


def start(make: Callable[[], Worker], parent: int) -> None:
    """Set a worker process up: leave Ctrl-C to the parent, and do not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    serve(make)


def serve(make: Callable[[], Worker]) -> None:
    """Make this process one in which `run` works."""
    global _worker
    pa.set_cpu_count(1)
    _keep_freed_memory()
    _worker = make()


def run(unit: Unit, row: int, stop: int) -> Result:
    return _worker.run(unit, row, stop)


def _keep_freed_memory() -> None:
    """Have freed blocks kept for the next unit, which needs the same sizes again.

    Given back and taken anew, their page faults cost 15% of a worker's time (measured on Linux).
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        pa.set_memory_pool(pa.system_memory_pool())
        mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the largest value that glibc takes
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _follow(parent: int) -> None:
    """Leave once the parent is gone: it may have been killed, and the queue it left behind never ends."""
    while os.getppid() == parent:
        time.sleep(ORPHAN_CHECK)
    os._exit(1)
