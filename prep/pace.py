"""How far a build has come and how fast it goes: what its progress line says."""

import time

from shared.progress import duration


class Pace:
    """Of a build of `total` tokens, of which `before` were there at this start, made in `seconds_before` seconds."""

    def __init__(self, total: int, before: int, seconds_before: float) -> None:
        self.total, self._before, self._seconds_before = total, before, seconds_before
        self._began = time.monotonic()
        self.text_bytes = 0  # read since

    def seconds(self) -> float:
        """Of all starts together."""
        return self._seconds_before + time.monotonic() - self._began

    def line(self, done: int) -> str:
        """`done` tokens are written. 77 columns for the whole job."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        rate = (done - self._before) / seconds
        left = duration((self.total - done) / rate) if rate else "?"
        return (
            f"{done / 1e6:.1f}/{self.total / 1e6:.1f} M tokens {done / self.total:.1%} · "
            f"{rate / 1e6:.2f} M tokens/s · {self.text_bytes / seconds / 1e6:.1f} MB/s · {left} left"
        )
