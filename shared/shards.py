"""uint16 shards as one stream of tokens, memory-mapped.

A shard is an NPY 1.0 file (numpy.lib.format): little-endian uint16, one dimension. The header is written here, padded
to 128 bytes, because NumPy's own padding has changed between releases and the shards' hashes must not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

HEADER_BYTES = 128
TOKEN_BYTES = 2
MAPPED = 256  # shards mapped at a time: each holds a file open, of which a process may often have 1,024


def shard_name(split: str, index: int) -> str:
    return f"{split}/{index:05d}.npy"


def shard_header(tokens: int) -> bytes:
    """The first 128 bytes of a shard of `tokens` tokens; the rest is tokens x 2 bytes, little-endian."""
    fields = f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({tokens},), }}".encode("latin-1")
    room = HEADER_BYTES - 10
    assert len(fields) < room
    return b"\x93NUMPY\x01\x00" + room.to_bytes(2, "little") + fields.ljust(room - 1) + b"\n"


def shard_bytes(tokens: int) -> int:
    return HEADER_BYTES + tokens * TOKEN_BYTES


@dataclass(frozen=True)
class Shard:
    """One shard as the manifest states it; `file` is relative to the data set."""

    file: str
    tokens: int
    bytes: int
    sha256: str


class TokenStream:
    """The tokens of a split, all shards end to end. `stream[a:b]` is a uint16 array; only what is asked for is read."""

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        self._paths = [folder / shard.file for shard in shards]
        for path, shard in zip(self._paths, shards, strict=True):
            with path.open("rb") as file:
                header = file.read(HEADER_BYTES)
            if header != shard_header(shard.tokens) or path.stat().st_size != shard_bytes(shard.tokens):
                raise ValueError(f"{path}: not a shard of {shard.tokens} tokens; run prep verify on the data set")
        self._tokens = [shard.tokens for shard in shards]
        self._ends = np.cumsum(self._tokens, dtype=np.int64)
        self._map = lru_cache(MAPPED)(self._map_shard)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, span: slice) -> npt.NDArray[np.uint16]:
        start, stop, step = span.indices(len(self))
        assert step == 1, "a stream is read in order"
        if stop <= start:
            return np.empty(0, dtype=np.uint16)
        first, last = np.searchsorted(self._ends, [start, stop - 1], side="right")
        parts = []
        for i in range(int(first), int(last) + 1):
            offset = int(self._ends[i]) - self._tokens[i]
            parts.append(self._map(i)[max(0, start - offset) : stop - offset])
        return np.asarray(parts[0]) if len(parts) == 1 else np.concatenate(parts)

    def take(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.uint16]:
        """The tokens at `positions`, any order: (N,) int64 -> (N,) uint16."""
        out = np.empty(len(positions), dtype=np.uint16)
        which = np.searchsorted(self._ends, positions, side="right")
        for i in np.unique(which).tolist():
            here = np.flatnonzero(which == i)
            out[here] = self._map(i)[positions[here] - (int(self._ends[i]) - self._tokens[i])]
        return out

    def _map_shard(self, i: int) -> npt.NDArray[np.uint16]:
        return np.memmap(self._paths[i], dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(self._tokens[i],))
