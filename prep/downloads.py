"""Whole files on their way into the Hub's cache: how much of them has come, how fast, how long it still takes.

The Hub's client tells that by progress bars, whose number and meaning differ between its versions and ways of transfer.
What all of them have in common is where they write: into files `*.incomplete` among the cache's blobs.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.progress import duration

BLOCK_BYTES = 512  # of st_blocks, whatever the file system


class Downloads:
    """The files under way, and those that have come since there were none; `blobs` is the cache's folder of them."""

    def __init__(self, blobs: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._blobs, self._clock = blobs, clock
        self._lock = threading.Lock()
        self._under_way = self._come = self._total = 0
        self._began = 0.0
        self._before: dict[str, int] = {}  # left there by a client that was killed, or another's

    @contextmanager
    def of(self, size: int) -> Iterator[None]:
        """Count a file of `size` bytes for the length of the block."""
        with self._lock:
            if not self._under_way:
                self._began, self._before, self._come, self._total = self._clock(), self._incomplete(), 0, 0
            self._under_way += 1
            self._total += size
        come = 0
        try:
            yield
            come = size
        finally:
            with self._lock:
                self._under_way -= 1
                self._come += come
                self._total += come - size

    def line(self) -> str:
        """What the progress line says; empty when nothing is under way."""
        with self._lock:
            if not self._under_way:
                return ""
            parts = sum(max(0, size - self._before.get(name, 0)) for name, size in self._incomplete().items())
            done, total = min(self._total, self._come + parts), self._total
            rate = done / max(self._clock() - self._began, 1e-9)
            left = duration((total - done) / rate) if rate else "?"
            files = "a file" if self._under_way == 1 else f"{self._under_way} files"
            share = f"{done / 1e6:.1f}/{total / 1e6:.1f} MB {done / max(1, total):.1%}"
            return f"fetching {files} from the Hub: {share} · {rate / 1e6:.1f} MB/s · {left} left"

    def _incomplete(self) -> dict[str, int]:
        """Bytes of each file that is not whole yet. One that is written out of order may have holes: they count not."""
        found = {}
        for path in self._blobs.glob("*.incomplete"):
            try:
                status = path.stat()
            except OSError:  # it is whole, and has its name
                continue
            found[path.name] = min(status.st_size, status.st_blocks * BLOCK_BYTES)
        return found
