"""batch(n): which sequences step n trains on, a pure function of (data id, seed, n).

The order is a stateless permutation of all sequences (shared/permutation.py, tag "order/1"), so nothing about it is
saved, a resume costs nothing, and no sequence is seen twice: there is no second epoch. Steps count from 1; step n takes
order positions (n-1)·B ... n·B-1, B the global batch.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from shared.permutation import Permutation
from shared.shards import TokenStream

TAG = "order/1"


@dataclass(frozen=True)
class Order:
    """The order of all `sequences` of a split in global batches of `batch` rows."""

    data_id: str
    seed: int
    sequences: int
    batch: int

    @property
    def steps(self) -> int:
        """How many whole batches there are."""
        return self.sequences // self.batch

    @cached_property
    def _permutation(self) -> Permutation:
        return Permutation(self.sequences, tag=TAG, data_id=self.data_id, seed=self.seed)

    def indices(self, step: int, rank: int = 0, world_size: int = 1) -> npt.NDArray[np.int64]:
        """The sequences of one step, (B / world_size,) int64: rank r of W takes rows r, r+W, ... of the global batch.

        IndexError when the split has no such step.
        """
        if not 1 <= step <= self.steps:
            raise IndexError(f"step {step} lies outside 1 ... {self.steps}")
        assert self.batch % world_size == 0, "the global batch is shared out evenly"
        first = (step - 1) * self.batch
        return self._permutation(np.arange(first + rank, first + self.batch, world_size))

    def require(self, last_step: int) -> None:
        """Refuse with a ValueError when the split does not last until `last_step`."""
        if last_step > self.steps:
            raise ValueError(
                f"{last_step} steps x {self.batch} sequences are {last_step * self.batch} sequences, the train split "
                f"has {self.sequences} and there is no second epoch: tokenize more"
                + (f", or give --steps {self.steps} or less" if self.steps else "")
            )


def rows(stream: TokenStream, indices: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
    """The tokens of some sequences, (len(indices), length + 1) int64: inputs are [:, :-1] and labels [:, 1:].

    Sequence i is stream[i·length : i·length + length + 1]: the last label of one is the first input of the next.
    """
    out = np.empty((len(indices), length + 1), dtype=np.int64)
    for row, i in zip(out, indices.tolist(), strict=True):
        row[:] = stream[i * length : i * length + length + 1]
    return out
