"""One progress line: live on a terminal, else a plain line every 30 seconds."""

import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO

LIVE_EVERY = 0.2  # seconds
PLAIN_EVERY = 30.0


class Progress:
    """Shows the latest line of a long piece of work, no oftener than a person or a log can use it."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream or sys.stdout
        self._clock = clock
        self._live = self._stream.isatty()
        self._shown = clock() if not self._live else 0.0
        self._width = 0

    def show(self, line: Callable[[], str], *, now: bool = False) -> None:
        """Show `line()` if it is time to; with `now`, whatever the time."""
        time_now = self._clock()
        if not now and time_now - self._shown < (LIVE_EVERY if self._live else PLAIN_EVERY):
            return
        self._shown = time_now
        text = line()
        if self._live:
            text = text[: shutil.get_terminal_size().columns - 1]  # a line that wraps cannot be overwritten
            print("\r" + text.ljust(self._width), end="", file=self._stream, flush=True)
            self._width = len(text)
        else:
            print(text, file=self._stream, flush=True)

    def say(self, line: str) -> None:
        """Print a line that stays, whatever is shown."""
        self.clear()
        print(line, file=self._stream, flush=True)

    def clear(self) -> None:
        """End the live line, so that what is printed next starts on a line of its own."""
        if self._live and self._width:
            print("\r" + " " * self._width + "\r", end="", file=self._stream, flush=True)
            self._width = 0


def duration(seconds: float) -> str:
    """A length of time for people: '42 s', '3 min 20 s', '1 h 05 min'."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
