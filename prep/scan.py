"""What the bytes of a shard say, found in the pass over the disk that hashes them."""

import numpy as np
import numpy.typing as npt

from shared.manifest import check_header, largest_id
from shared.shards import HEADER_BYTES, TOKEN_BYTES, Shard
from shared.tokenizer import Identity

Positions = npt.NDArray[np.int64]


class ShardScan:
    """Fed a shard's bytes in order, chunk by chunk, each of whole tokens.

    `problem` is the first thing wrong with its header or ids; `starts` and `ends` are the places of `<s>` and `</s>`
    in the shard; `text_bytes` sums `piece_bytes` over its tokens, where that table (vocab,) is given.
    """

    def __init__(self, shard: Shard, identity: Identity, piece_bytes: npt.NDArray[np.int64] | None) -> None:
        self.problem: str | None = None
        self.text_bytes = 0
        self._shard, self._identity = shard, identity
        self._sizes = None
        if piece_bytes is not None:  # every possible id has an entry, so that a wrong one is no IndexError
            self._sizes = np.zeros(1 << 16, dtype=np.uint32)
            self._sizes[: len(piece_bytes)] = piece_bytes
        self._at = 0
        self._starts: list[Positions] = []
        self._ends: list[Positions] = []

    @property
    def starts(self) -> Positions:
        return np.concatenate([np.empty(0, np.int64), *self._starts])

    @property
    def ends(self) -> Positions:
        return np.concatenate([np.empty(0, np.int64), *self._ends])

    def __call__(self, chunk: memoryview) -> None:
        if not self._at:
            self.problem = check_header(self._shard.file, self._shard.tokens, chunk)
            chunk = chunk[HEADER_BYTES:]
        largest = largest_id(chunk)
        if largest >= self._identity.vocab_size and self.problem is None:
            self.problem = f"holds id {largest}, the vocabulary ends at {self._identity.vocab_size - 1}"
        ids = np.frombuffer(chunk, dtype="<u2")
        # Both ids are small, as a rule, so that one comparison leaves few candidates.
        low = np.flatnonzero(ids <= max(self._identity.bos_id, self._identity.eos_id))
        found = ids[low]
        self._starts.append(low[found == self._identity.bos_id] + self._at)
        self._ends.append(low[found == self._identity.eos_id] + self._at)
        if self._sizes is not None:
            self.text_bytes += int(self._sizes.take(ids).sum(dtype=np.uint64))
        self._at += len(chunk) // TOKEN_BYTES
