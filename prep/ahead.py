"""Steps on their way to the worker processes: from the Hub, their units are fetched first, some way ahead."""

import os
from collections.abc import Iterable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from typing import TYPE_CHECKING

from prep import worker
from prep.plan import Step
from prep.sources import LocalSource, Unit
from prep.transfers import in_background
from prep.worker import Result

if TYPE_CHECKING:
    from prep.hub import HubSource

STEPS_AHEAD = 16  # beyond those that keep the workers busy
BYTES_AHEAD = 256 << 20  # of units fetched and not yet written; a single one may be larger


class Ahead:
    """Hands steps to `pool`. With a source on the Hub, each waits in a thread until its unit is on this disk.

    No more is fetched than the `left` tokens are likely to take, going by the tokens a byte so far.
    """

    def __init__(self, source: "LocalSource | HubSource", pool: Executor, workers: int, left: int) -> None:
        self._source, self._pool, self._workers, self._left = source, pool, workers, left
        self._steps = self._bytes = self._tokens = 0  # read and written so far
        if not isinstance(source, LocalSource) and isinstance(pool, ProcessPoolExecutor):
            pool.submit(os.getpid).result()  # the processes are forked now, before there are threads

    def wants(self, pending: Iterable[Step]) -> bool:
        """Whether one more step may be under way beside those `pending`."""
        steps = list(pending)
        if isinstance(self._source, LocalSource):
            return len(steps) < 2 * self._workers
        # At first no further than it has come, since few units say little about how many tokens a byte makes.
        if not steps or len(steps) >= min(self._workers + self._steps, 2 * self._workers + STEPS_AHEAD):
            return not steps
        size = sum(self._size(step, step.stop) for step in steps)
        enough = self._bytes and size * self._tokens >= self._left * self._bytes
        return not enough and size < BYTES_AHEAD

    def written(self, step: Step, next_row: int, left: int) -> None:
        """The rows of `step` up to `next_row` are in the data set, which still takes `left` tokens."""
        self._steps += 1
        self._bytes += self._size(step, next_row)
        self._tokens += self._left - left
        self._left = left

    def release(self, unit: Unit) -> None:
        """What was fetched for the unit is not needed any more."""
        self._source.release(unit)

    def _size(self, step: Step, stop: int) -> int:
        """Packed bytes of the rows of `step` up to `stop`, as far as they must be fetched."""
        rows = step.unit.rows  # None for .zst: the file stays here, so that it takes none of the room for units
        return 0 if rows is None else self._source.size(step.unit) * (stop - step.row) // max(1, rows)

    def submit(self, step: Step) -> "Future[Result]":
        source = self._source
        if isinstance(source, LocalSource):
            return self._pool.submit(worker.run, step.unit, step.row, step.stop)

        def fetch_and_run() -> Result:
            source.fetch(step.unit)
            return self._pool.submit(worker.run, step.unit, step.row, step.stop).result()

        return in_background(fetch_and_run)

    def close(self) -> None:
        """End what is still being fetched."""
        self._source.close()
